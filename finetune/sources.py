"""Read training examples from the files that people have.

A record's keys say which format it is in:

    {"prompt": ..., "completion": ...}                          prompt/completion pair ("system" may stand beside)
    {"instruction": ..., "input": ..., "output": ...}           Alpaca ("input" and "system" may be absent or empty)
    {"messages": [{"role": ..., "content": ...}, ...]}          OpenAI ("weight": 0 keeps an answer from being trained)
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT ("system" may stand beside)
    {"text": ...}                                               plain text, trained whole
    {"token_ids": ..., "loss_mask": ..., "label_ids": ...}      a row that is processed already

`.jsonl` holds one record a line, `.json` an array of them, `.parquet` one a row; the first two also gzipped or zstd'ed.
A `.txt` file is one plain text. Other keys of a record are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import InputError
from data_prep.sources import JSON_SUFFIXES, LINES_SUFFIXES, Fault, FaultPolicy
from data_prep.streams import open_bytes
from finetune.conversation import Conversation, Example, PlainText, Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}

Record = dict[str, Any]


class ReadyRow(NamedTuple):
    """A processed row, int32 (3, s): tokens, loss mask, labels."""

    planes: np.ndarray


class Located(NamedTuple):
    """A record, its number in the file (from 0), and the place where a person finds it: a line, or "row 7"."""

    number: int
    place: str
    record: Any


class Read(NamedTuple):
    """An example and the number of its record in the file."""

    number: int
    example: Example | ReadyRow


def read_examples(path: Path, faults: FaultPolicy) -> Iterator[Read]:
    """The examples of one file, in file order.

    A record is bad that is of no known format, misses a field or has one of another type, names an unknown role, has
    turns in an order that no chat format can express, or an empty user turn.

    Raises:
        InputError: with file, line and field, at a file that cannot be read on, and at a bad record unless `faults`
            says "skip".
    """
    for number, place, record in read_records(path):
        try:
            yield Read(number, to_example(record))
        except InputError as error:
            faults(Fault(str(path), place, str(error)))


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


def to_example(record: Any) -> Example | ReadyRow:
    """One record of any format.

    Raises:
        InputError: naming the field (the caller adds file and line).
    """
    if isinstance(record, dict):
        if all(key in record for key in _ROW_KEYS):
            return _ready_row(record)
        if "text" in record and not any(all(key in record for key in keys) for keys in FORMATS):
            text = _text(record, "text")
            if not text.strip():
                raise InputError("field 'text' is empty: fill it or drop the record")
            return PlainText(text)
    return to_conversation(record)


def to_conversation(record: Any) -> Conversation:
    """One record of any of the conversation formats.

    Raises:
        InputError: naming the field (the caller adds file and line).
    """
    if isinstance(record, _Unparsed):
        raise InputError(f"{record.reason}: repair or remove it")
    if not isinstance(record, dict):
        raise InputError(f"a record must be an object, not {_kind(record)}")
    for keys, convert in FORMATS.items():
        if all(key in record for key in keys):
            conversation = Conversation(tuple(convert(record)))
            break
    else:
        known = "; ".join(" + ".join(keys) for keys in (*FORMATS, ("text",), _ROW_KEYS))
        raise InputError(
            f"unknown format with the fields {', '.join(map(str, record)) or '(none)'}: expected one of {known}"
        )
    for number, turn in enumerate(conversation.turns):
        if turn.role == "user" and not turn.text.strip():
            raise InputError(f"turn {number}: the user's text is empty: fill it or drop the record")
    return conversation


def _pair(record: Record) -> Iterator[Turn]:
    yield from _system(record)
    yield Turn("user", _text(record, "prompt"))
    yield Turn("assistant", _text(record, "completion"))


def _alpaca(record: Record) -> Iterator[Turn]:
    yield from _system(record)
    instruction, context = _text(record, "instruction"), _text(record, "input", optional=True)
    yield Turn("user", f"{instruction}\n{context}" if context else instruction)
    yield Turn("assistant", _text(record, "output"))


def _messages(record: Record) -> Iterator[Turn]:
    yield from _turns(record, "messages", role_key="role", text_key="content")


def _sharegpt(record: Record) -> Iterator[Turn]:
    turns = list(_turns(record, "conversations", role_key="from", text_key="value"))
    if turns[0].role != "system":
        yield from _system(record)
    yield from turns


FORMATS: dict[tuple[str, ...], Callable[[Record], Iterator[Turn]]] = {
    ("messages",): _messages,
    ("conversations",): _sharegpt,
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _alpaca,
}
_ROW_KEYS = ("token_ids", "loss_mask", "label_ids")


def _ready_row(record: Record) -> ReadyRow:
    try:
        planes = np.array([record[key] for key in _ROW_KEYS])
    except ValueError:
        planes = np.empty(0)
    if planes.ndim != 2 or planes.dtype.kind not in "iu" or not planes.shape[1]:
        raise InputError(f"{', '.join(_ROW_KEYS)} must be lists of integers, all of one length")
    if planes.min() < 0 or planes.max() >= 1 << 30:
        raise InputError("token_ids and label_ids must be ids of a vocabulary: process the row again")
    if not ((planes[1] == 0) | (planes[1] == 1)).all():
        raise InputError("field 'loss_mask' holds other numbers than 0 and 1")
    return ReadyRow(planes.astype(np.int32))


def _system(record: Record) -> Iterator[Turn]:
    if text := _text(record, "system", optional=True):
        yield Turn("system", text)


def _turns(record: Record, field: str, *, role_key: str, text_key: str) -> Iterator[Turn]:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"field '{field}' must be a list of turns, not {_kind(turns)}")
    for number, turn in enumerate(turns):
        place = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise InputError(f"field '{place}' must be an object, not {_kind(turn)}")
        role = _text(turn, role_key, place=f"{place}.")
        if role not in ROLES:
            raise InputError(f"field '{place}.{role_key}': unknown role '{role}': use one of {', '.join(ROLES)}")
        yield Turn(ROLES[role], _text(turn, text_key, place=f"{place}."), trained=_weight(turn, place))


def _weight(turn: Record, place: str) -> bool:
    """OpenAI's per-message weight: 0 or 1."""
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(f"field '{place}.weight' must be 0 or 1, not {json.dumps(weight)}: a loss mask knows no other")
    return bool(weight)


def _text(record: Record, field: str, *, optional: bool = False, place: str = "") -> str:
    value = record.get(field)
    if optional and value is None:
        return ""
    if field not in record:
        raise InputError(f"field '{place}{field}' is missing")
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise InputError(f"field '{place}{field}' must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"field '{place}{field}' holds half of a surrogate pair: repair the text") from None
    return value


def _is_text_part(part: Any) -> bool:
    """OpenAI also writes a content as a list of parts; those of text say the same as a string."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
