"""Read conversations from the JSON and JSONL files that people have.

A record's keys say which format it is in:

    {"prompt": ..., "completion": ...}                          prompt/completion pair ("system" may stand beside)
    {"instruction": ..., "input": ..., "output": ...}           Alpaca ("input" and "system" may be absent or empty)
    {"messages": [{"role": ..., "content": ...}, ...]}          OpenAI
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT ("system" may stand beside)

A `.json` file holds an array of records, a `.jsonl` file one record a line. Other keys of a record are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import InputError
from finetune.chat_format import Conversation, Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}

Record = dict[str, Any]


class Located(NamedTuple):
    """A record and the line of its file on which it starts."""

    line: int
    record: Any


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of one file, in file order.

    Raises:
        InputError: with file, line and field: unreadable JSON, an unknown format, a missing or wrongly typed field, an
            unknown role, a turn order that the chat format cannot express, an empty user turn.
    """
    for line, record in read_records(path):
        try:
            yield to_conversation(record)
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from None


def read_records(path: Path) -> Iterator[Located]:
    """The JSON values of a `.jsonl` file (blank lines are skipped) or of the array in a `.json` file."""
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: conversations are read from .json and .jsonl: rename or convert it")
    try:
        content = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    with content:
        try:
            yield from _lines(content) if path.suffix == ".jsonl" else _array(_decode(content.read(), line=1))
        except _Unreadable as error:
            raise InputError(f"{path}, line {error.line}: {error.reason}: repair or remove it") from None


class _Unreadable(Exception):
    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason


def _decode(content: bytes, *, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(line + content.count(b"\n", 0, error.start), f"not UTF-8 ({error.reason})") from None


def _lines(lines: Iterable[bytes]) -> Iterator[Located]:
    for number, content in enumerate(lines, start=1):
        line = _decode(content, line=number)
        if not line.strip():
            continue
        try:
            yield Located(number, json.loads(line))
        except json.JSONDecodeError as error:
            raise _Unreadable(number, f"not valid JSON ({error.msg} at column {error.colno})") from None


def _array(text: str) -> Iterator[Located]:
    """Element by element, so that each is known by its line."""
    decoder = json.JSONDecoder()
    position, line, counted = _skip_space(text, 0), 1, 0

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
        yield Located(start, record)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise _Unreadable(line_at(position), "not valid JSON (',' or ']' is expected after a record)")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def to_conversation(record: Any) -> Conversation:
    """One record of any of the formats as a conversation.

    Raises:
        InputError: naming the field (the caller adds file and line).
    """
    if not isinstance(record, dict):
        raise InputError(f"a record must be an object, not {_kind(record)}")
    for keys, convert in FORMATS.items():
        if all(key in record for key in keys):
            conversation = Conversation(tuple(convert(record)))
            break
    else:
        known = "; ".join(" + ".join(keys) for keys in FORMATS)
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
    yield from _system(record)
    yield from _turns(record, "conversations", role_key="from", text_key="value")


FORMATS: dict[tuple[str, ...], Callable[[Record], Iterator[Turn]]] = {
    ("messages",): _messages,
    ("conversations",): _sharegpt,
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _alpaca,
}


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
        yield Turn(ROLES[role], _text(turn, text_key, place=f"{place}."))


def _text(record: Record, field: str, *, optional: bool = False, place: str = "") -> str:
    value = record.get(field)
    if optional and value is None:
        return ""
    if field not in record:
        raise InputError(f"field '{place}{field}' is missing")
    if not isinstance(value, str):
        raise InputError(f"field '{place}{field}' must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"field '{place}{field}' holds half of a surrogate pair: repair the text") from None
    return value


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
