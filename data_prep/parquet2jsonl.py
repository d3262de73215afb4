"""The step parquet -> JSON lines: IN/<language>/*.parquet -> OUT/<language>/*.jsonl.

One object per row with all columns in their order; the column `content` is renamed `text`. A file appears under its
name when it is complete; running again writes the same files again, never appends. Large files are divided between row
groups (division.py): each part is converted by a task of its own, and joined to one file. Also runs as a script:
`python data_prep/parquet2jsonl.py IN --out OUT`.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Collection, Iterator
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson
from isal.isal_zlib import crc32

from data_prep.division import divide
from data_prep.engine import Stage, Task, run_step
from data_prep.errors import InputError
from data_prep.manifest import TASKS, Record, input_identity, record
from data_prep.sources import PARQUET_TEXT_KEY, TEXT_KEY, Fault, FaultPolicy, Part, Source
from data_prep.streams import READ_SIZE, files_below

# Bytes of a part: a 64th of the corpus, within these. To join parts takes a while: not worth it for small files.
PART_BYTES = (16 << 20, 256 << 20)


class ConvertTask(NamedTuple):
    """One file, or a part of it."""

    source: str
    target: str
    name: str
    on_error: Literal["stop", "skip"] = "stop"
    part: Part | None = None
    widened: tuple[str, ...] | None = None  # `_integers_with_nulls`, where that is known
    pieces: tuple[str, ...] = ()  # what a file's parts were converted to: all that is left is to join them


def parquet_to_jsonl(
    source: Path,
    out: Path,
    *,
    on_error: Literal["stop", "skip"] = "stop",
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert every parquet file below `source`; the manifest. With "skip" what cannot be read is left out and listed.

    Raises:
        InputError: no parquet file, or one that is damaged (unless `on_error` is "skip").
    """
    if source.is_file():
        files, root = [source], source.parent
    else:
        files, root = [path for path in files_below(source) if path.suffix == ".parquet"], source
    if not files:
        raise InputError(f"{source}: holds no .parquet file")
    identities = [input_identity(path) for path in files]
    corpus_bytes = sum(identity["bytes"] for identity in identities)
    before, tasks = [], []
    for path in files:
        name = path.relative_to(root).with_suffix(".jsonl").as_posix()
        whole = ConvertTask(str(path), str(out / name), name, on_error)
        parts = _parts(whole, corpus_bytes, out / TASKS)
        before += [Task(f"{name}.part-{number:05d}", part) for number, part in enumerate(parts)]
        tasks.append(Task(name, whole._replace(pieces=tuple(part.target for part in parts))))
    return run_step(
        "parquet2jsonl",
        out,
        tasks,
        convert_file,
        before=Stage(before, convert_file) if before else None,
        settings={"on_error": on_error, "inputs": identities},
        processes=processes,
        overwrite=overwrite,
    )


def _parts(task: ConvertTask, corpus_bytes: int, folder: Path) -> list[ConvertTask]:
    """The parts of a large file, to be put down in `folder`; none of one that stays whole."""
    import pyarrow
    import pyarrow.parquet

    part_bytes = min(max(corpus_bytes // 64, PART_BYTES[0]), PART_BYTES[1])
    try:
        parts = [source.part for source, _ in divide(Source(task.source, task.name), part_bytes, corpus_bytes)]
        if len(parts) < 2:
            return []
        widened = tuple(_integers_with_nulls(pyarrow.parquet.ParquetFile(task.source)))
    except (InputError, pyarrow.ArrowException, OSError):  # damaged: whoever converts it says so, or leaves it out
        return []
    return [
        task._replace(target=str(folder / f"{task.name}.part-{number:05d}"), part=part, widened=widened)
        for number, part in enumerate(parts)
    ]


def convert_file(task: ConvertTask) -> Record:
    """Convert one file or a part of it, or join a file's parts: what the engine's processes run."""
    target = Path(task.target)
    partial = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    faults = FaultPolicy(task.on_error)
    counts: Counter[str] = Counter()
    num_rows = checksum = 0
    try:
        with partial.open("wb") as lines:
            for block in _joined(task.pieces) if task.pieces else _lines(task, faults, counts):
                num_rows += block.count(b"\n")
                checksum = crc32(block, checksum)
                lines.write(block)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    outputs = {}
    if counts["files_left_out"]:
        partial.unlink()
    else:
        os.replace(partial, target)
        outputs = {} if task.part else {task.name: {"rows": num_rows, "checksum": f"{checksum:08x}"}}
    if not task.pieces:  # else its parts have counted them
        counts["documents"] = num_rows
    return record(inputs=[task.source], outputs=outputs, counts=dict(counts), faults=faults.faults)


def _joined(pieces: tuple[str, ...]) -> Iterator[bytes]:
    for piece in pieces:
        with Path(piece).open("rb") as lines:
            while block := lines.read(READ_SIZE):
                yield block


def _lines(task: ConvertTask, faults: FaultPolicy, counts: Counter[str]) -> Iterator[bytes]:
    """The rows of a file, or of a part of it, as lines; of a damaged row group, those before the damage."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(task.source, page_checksum_verification=True)
        widened = _integers_with_nulls(file) if task.widened is None else task.widened
    except (pyarrow.ArrowException, OSError) as error:
        faults(Fault(task.source, "row 1 or after", f"cannot be converted ({_first_line(error)})"))
        counts["files_left_out"] += 1
        return
    names = [TEXT_KEY if name == PARQUET_TEXT_KEY else name for name in file.schema_arrow.names]
    if len(set(names)) < len(names):
        raise InputError(f"{task.source}: has two columns of the name {max(names, key=names.count)}: rename one")
    part = task.part or Part(0, file.num_row_groups, 0)
    end = part.first
    for group in range(part.start, part.stop):
        number, end = end, end + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=512, row_groups=[group]):
                yield _lines_of(batch, names, widened, faults, task.source, number)
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            rest = f"row {number + 1} or after"
            faults(Fault(task.source, rest, f"cannot be converted ({_first_line(error)}); left out up to row {end}"))


def _lines_of(
    batch: Any, names: list[str], widened: Collection[str], faults: FaultPolicy, source: str, number: int
) -> bytes:
    """The lines of a batch that begins with row `number`; if some cannot be converted, each row for itself."""
    try:
        columns = [_values(*column, widened) for column in zip(names, batch.columns, strict=True)]
        return b"".join(json_line(dict(zip(names, cells, strict=True))) for cells in zip(*columns, strict=True))
    except (ValueError, OverflowError, TypeError) as error:  # not UTF-8, a date that Python does not know, …
        if batch.num_rows > 1:
            rows = (batch.slice(i, 1) for i in range(batch.num_rows))
            return b"".join(_lines_of(row, names, widened, faults, source, number + i) for i, row in enumerate(rows))
        faults(Fault(source, f"row {number + 1}", f"cannot be converted ({_first_line(error.__cause__ or error)})"))
        return b""


def _values(name: str, column: Any, widened: Collection[str]) -> list[Any]:
    import pyarrow

    if name == TEXT_KEY and pyarrow.types.is_binary(column.type):  # as some writers store text
        column = column.cast(pyarrow.string())
    elif name in widened:
        column = column.cast(pyarrow.float64(), safe=False)
    elif pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python has microseconds
        column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values


def _integers_with_nulls(file: Any) -> set[str]:
    """Integer columns with missing values: a data frame holds those as floats, so the reference writes 103.0."""
    import pyarrow

    names = {field.name for field in file.schema_arrow if pyarrow.types.is_integer(field.type)}
    with_nulls, unknown = set(), set()
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in names:
                statistics = column.statistics
                if statistics is None or not statistics.has_null_count:
                    unknown.add(column.path_in_schema)
                elif statistics.null_count:
                    with_nulls.add(column.path_in_schema)
    for name in unknown - with_nulls:
        if file.read(columns=[name])[name].null_count:
            with_nulls.add(name)
    return with_nulls


def json_line(row: dict[str, Any]) -> bytes:
    """One object as a line: ASCII, slashes escaped (as pandas writes them, hence the reference); NaN is null."""
    line = orjson.dumps(row, default=_plain, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATETIME)
    if not line.isascii():  # only strings hold such characters, and slashes
        line = line.decode().encode("ascii", "json_escape")
    return line.replace(b"/", b"\\/")


def _plain(value: Any) -> str:
    """What JSON has no word for."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
