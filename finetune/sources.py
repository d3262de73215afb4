"""Read training examples from the files that people have.

`.jsonl` holds one record a line, `.json` an array of them, `.parquet` one a row; the first two also gzipped or zstd'ed.
A `.txt` file is one plain text. What a record says: formats.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import InputError
from data_prep.sources import JSON_SUFFIXES, LINES_SUFFIXES, Fault, FaultPolicy
from data_prep.streams import open_bytes
from finetune.conversation import Example
from finetune.formats import ReadyRow, to_example


class Located(NamedTuple):
    """A record, its number in the file (from 0), and the place where a person finds it: a line, or "row 7"."""

    number: int
    place: str
    record: Any


class Read(NamedTuple):
    """An example and the number of its record in the file."""

    number: int
    example: Example | ReadyRow


def read_examples(path: Path, faults: FaultPolicy, text_key: str = "text") -> Iterator[Read]:
    """The examples of one file, in file order. text_key: the field that holds a plain text.

    A record is bad that is of no known format, misses a field or has one of another type, names an unknown role, has
    turns in an order that no chat format can express, or an empty user turn.

    Raises:
        InputError: with file, line and field, at a bad record and at a file that cannot be read on, unless `faults`
            says "skip".
    """
    if path.suffix == ".txt":
        text_key = "text"
    number = -1
    try:
        for number, place, record in read_records(path):
            try:
                if isinstance(record, _Unparsed):
                    raise InputError(f"{record.reason}: repair or remove it")
                example = to_example(record, text_key)
            except InputError as error:
                faults(Fault(str(path), place, str(error)))
            else:
                yield Read(number, example)
    except InputError as error:  # with "skip" that is the file, not a record
        if faults.on_error == "stop":
            raise
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        faults(Fault(str(path), f"after record {number + 1}", f"{reason}; the rest is left out"))


def read_records(path: Path) -> Iterator[Located]:
    """The JSON values of a `.jsonl` file (blank lines are skipped) or of the array in a `.json` file; parquet rows."""
    name = path.name
    if not name.endswith((*JSON_SUFFIXES, *LINES_SUFFIXES, ".parquet", ".txt")):
        raise InputError(f"{path}: examples are read from .json, .jsonl, .parquet and .txt: rename or convert it")
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    with open_bytes(str(path)) as content:
        try:
            if name.endswith(".txt"):
                yield Located(0, "1", {"text": _decode(content.read(), line=1)})
            elif name.endswith(LINES_SUFFIXES):
                yield from _lines(content)
            elif _is_object(first := content.readline()):
                yield from _lines(chain([first], content))
            else:
                yield from _array(_decode(first + content.read(), line=1))
        except _Unreadable as error:
            raise InputError(f"{path}:{error.line}: {error.reason}: repair or remove it") from None


def _is_object(line: bytes) -> bool:
    """Whether a `.json` file's first line is a whole record, so that the file is one of lines after all."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class _Unreadable(Exception):
    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason


def _decode(content: bytes, *, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(line + content.count(b"\n", 0, error.start), f"not UTF-8 ({error.reason})") from None


class _Unparsed(NamedTuple):
    """In place of a record: why a line holds none. Only its own line is lost."""

    reason: str


def _lines(lines: Iterable[bytes]) -> Iterator[Located]:
    record: Any
    for number, content in enumerate(lines):
        try:
            line = _decode(content, line=number + 1)
            if not line.strip():
                continue
            record = json.loads(line)
        except _Unreadable as error:
            record = _Unparsed(error.reason)
        except json.JSONDecodeError as error:
            record = _Unparsed(f"not valid JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            record = _Unparsed("not valid JSON (nested too deeply)")
        yield Located(number, str(number + 1), record)


def _array(text: str) -> Iterator[Located]:
    """Element by element, so that each is known by its line."""
    decoder = json.JSONDecoder()
    position, line, counted, number = _skip_space(text, 0), 1, 0, 0

    def line_at(end: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, end), end
        return line

    if not text.startswith("[", position):
        raise _Unreadable(line_at(position), "an array of records is expected (one record a line is .jsonl)")
    position = _skip_space(text, position + 1)
    while not text.startswith("]", position):
        start = line_at(position)
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _Unreadable(line_at(error.pos), f"not valid JSON ({error.msg})") from None
        yield Located(number, str(start), record)
        number += 1
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise _Unreadable(line_at(position), "not valid JSON (',' or ']' is expected after a record)")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    # A column stands in every row: where it is null, the record has no such field.
                    present = {key: value for key, value in record.items() if value is not None}
                    yield Located(number, f"row {number + 1}", present)
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is not a whole parquet file ({reason}): fetch it again") from None
