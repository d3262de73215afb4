"""The step parquet -> JSON lines: IN/<language>/*.parquet -> OUT/<language>/*.jsonl.

One object per row with all columns in their order; the column `content` is renamed `text`. A file appears under its
name when it is complete; running again writes the same files again, never appends. Also runs as a script:
`python data_prep/parquet2jsonl.py IN --out OUT`.
"""

from __future__ import annotations

import codecs
import os
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from data_prep.engine import Task, run_step
from data_prep.errors import InputError, full_disk
from data_prep.manifest import Record, input_identity, record
from data_prep.sources import PARQUET_TEXT_KEY, TEXT_KEY, Fault
from data_prep.streams import files_below


class ConvertTask(NamedTuple):
    """One file."""

    source: str
    target: str
    name: str
    on_error: Literal["stop", "skip"] = "stop"


def parquet_to_jsonl(
    source: Path,
    out: Path,
    *,
    on_error: Literal["stop", "skip"] = "stop",
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert every parquet file below `source`; the manifest. With "skip" a damaged file is left out and listed.

    Raises:
        InputError: no parquet file, or one that is damaged (unless `on_error` is "skip").
    """
    if source.is_file():
        files, root = [source], source.parent
    else:
        files, root = [path for path in files_below(source) if path.suffix == ".parquet"], source
    if not files:
        raise InputError(f"{source}: holds no .parquet file")
    tasks = []
    for path in files:
        name = path.relative_to(root).with_suffix(".jsonl").as_posix()
        tasks.append(Task(name, ConvertTask(str(path), str(out / name), name, on_error)))
    settings = {"on_error": on_error, "inputs": [input_identity(path) for path in files]}
    return run_step(
        "parquet2jsonl", out, tasks, convert_file, settings=settings, processes=processes, overwrite=overwrite
    )


def convert_file(task: ConvertTask) -> Record:
    """Convert one file: what the engine's processes run."""
    import pyarrow
    import pyarrow.parquet

    target = Path(task.target)
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        file = pyarrow.parquet.ParquetFile(task.source)
        names = [TEXT_KEY if name == PARQUET_TEXT_KEY else name for name in file.schema_arrow.names]
        if len(set(names)) < len(names):
            raise InputError(f"{task.source}: has two columns of the name {max(names, key=names.count)}: rename one")
        widened = _integers_with_nulls(file)
        with partial.open("wb") as lines:
            for batch in file.iter_batches(batch_size=512):
                columns = [
                    (column.cast(pyarrow.float64(), safe=False) if name in widened else column).to_pylist()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                ]
                for cells in zip(*columns, strict=True):
                    lines.write(json_line(dict(zip(names, cells, strict=True))))
                count += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        partial.unlink(missing_ok=True)
        if full_disk(error):
            raise
        fault = Fault(task.source, f"row {count + 1} or after", f"cannot be converted ({str(error).splitlines()[0]})")
        if task.on_error == "stop":
            raise InputError(f"{fault}: fetch the file again, or leave it out with --on-error skip") from None
        return record(inputs=[task.source], counts={"documents": 0, "files_left_out": 1}, faults=[fault])
    os.replace(partial, target)
    return record(inputs=[task.source], outputs={task.name: {"rows": count}}, counts={"documents": count})


def _integers_with_nulls(file: Any) -> set[str]:
    """Integer columns with missing values: a data frame holds those as floats, so the reference writes 103.0."""
    import pyarrow

    names = [field.name for field in file.schema_arrow if pyarrow.types.is_integer(field.type)]
    if not names:
        return set()
    table = file.read(columns=names)
    return {name for name in names if table[name].null_count}


def json_line(row: dict[str, Any]) -> bytes:
    """One object as a line: ASCII, slashes escaped (as pandas writes them, hence the reference); NaN is null."""
    line = orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME)
    if not line.isascii():  # only strings hold such characters, and slashes
        line = line.decode().encode("ascii", "json_escape")
    return line.replace(b"/", b"\\/")


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler that writes the characters it cannot encode as JSON escapes."""
    assert isinstance(error, UnicodeEncodeError)
    return encode_basestring_ascii(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json_escape", _json_escape)


def main(arguments: list[str] | None = None) -> None:
    """The command line of this step."""
    from data_prep.commands import run

    run("parquet2jsonl", arguments)


if __name__ == "__main__":
    main()
