"""The step parquet -> JSON lines: IN/<language>/*.parquet -> OUT/<language>/*.jsonl.

One object per row with all columns in their order; the column `content` is renamed `text`. A file appears under its
name when it is complete; running again writes the same files again, never appends. Also runs as a script:
`python data_prep/parquet2jsonl.py IN --out OUT`.
"""

from __future__ import annotations

import json
import math
import os
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.engine import Task, run_step
from data_prep.errors import InputError
from data_prep.manifest import Record, input_identity, record
from data_prep.sources import PARQUET_TEXT_KEY, TEXT_KEY


class ConvertTask(NamedTuple):
    """One file."""

    source: str
    target: str
    name: str


def parquet_to_jsonl(source: Path, out: Path, *, processes: int = 1, overwrite: bool = False) -> dict[str, Any]:
    """Convert every parquet file below `source`; the manifest.

    Raises:
        InputError: no parquet file, or one that is damaged.
    """
    if source.is_file():
        files, root = [source], source.parent
    else:
        files, root = sorted(p for p in source.rglob("*.parquet") if p.is_file()), source
    if not files:
        raise InputError(f"{source}: holds no .parquet file")
    tasks = []
    for path in files:
        name = path.relative_to(root).with_suffix(".jsonl").as_posix()
        tasks.append(Task(name, ConvertTask(str(path), str(out / name), name)))
    settings = {"inputs": [input_identity(path) for path in files]}
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
        keys = [json.dumps(name) + ":" for name in names]
        widened = _integers_with_nulls(file)
        with partial.open("w", encoding="ascii", newline="") as lines:
            for batch in file.iter_batches(batch_size=512):
                columns = [
                    [key + _value(float(cell) if name in widened and cell is not None else cell) for cell in column]
                    for key, name, column in zip(keys, batch.schema.names, map(_cells, batch.columns), strict=True)
                ]
                for cells in zip(*columns, strict=True):
                    # Slashes are in strings only. Escaped is how pandas writes them, hence the reference.
                    lines.write("{" + ",".join(cells).replace("/", "\\/") + "}\n")
                count += batch.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{task.source}: row {count + 1} or after: cannot be converted ({reason})") from None
    os.replace(partial, target)
    return record(inputs=[task.source], outputs={task.name: {"rows": count}}, counts={"documents": count})


def _cells(column: Any) -> list[Any]:
    cells: list[Any] = column.to_pylist()
    return cells


def _integers_with_nulls(file: Any) -> set[str]:
    """Integer columns with missing values: a data frame holds those as floats, so the reference writes 103.0."""
    import pyarrow

    names = [field.name for field in file.schema_arrow if pyarrow.types.is_integer(field.type)]
    if not names:
        return set()
    table = file.read(columns=names)
    return {name for name in names if table[name].null_count}


def _value(value: Any) -> str:
    """One JSON value, ASCII; what JSON has no word for (NaN, infinity) is null."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value, separators=(",", ":"), default=str)


def main(arguments: list[str] | None = None) -> None:
    """The command line of this step."""
    from data_prep.commands import run

    run("parquet2jsonl", arguments)


if __name__ == "__main__":
    main()
