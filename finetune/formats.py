"""One record of any known format as an example. Its keys say which format it is in:

    {"prompt": ..., "completion": ...}                          a pair ("response" is the same as "completion")
    {"instruction": ..., "input": ..., "output": ...}           Alpaca ("input" may be absent or empty; "response" too)
    {"messages": [{"role": ..., "content": ...}, ...]}          OpenAI ("weight": 0 keeps an answer from being trained)
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT (its turns may also have role and content)
    {"text": ...}                                               plain text, trained whole
    {"token_ids": ..., "loss_mask": ..., "label_ids": ...}      a row that is processed already

"system" may stand beside the first four. Other keys of a record are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import InputError
from finetune.conversation import Conversation, Example, PlainText, Role, Turn, TurnError

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


def to_example(record: Any, text_key: str = "text") -> Example | ReadyRow:
    """One record of any format. text_key: the field that holds a plain text.

    Raises:
        InputError: naming the field (the caller adds file and line).
    """
    if not isinstance(record, dict):
        raise InputError(f"a record must be an object, not {_kind(record)}: write it as one of the formats")
    if all(key in record for key in _ROW_KEYS):
        return _ready_row(record)
    for keys, convert in FORMATS.items():
        if all(key in record for key in keys):
            return _conversation(record, keys[0], convert(record, *keys))
    if text_key in record:
        text = _text(record, text_key)
        if not text.strip():
            raise InputError(f"field '{text_key}' is empty: fill it or drop the record")
        return PlainText(text)
    known = "; ".join(" + ".join(keys) for keys in (*FORMATS, (text_key,), _ROW_KEYS))
    fields = ", ".join(map(str, record)) or "(none)"
    raise InputError(f"unknown format with the fields {fields}: expected one of {known}")


def _conversation(record: Record, field: str, said: Iterator[Turn]) -> Conversation:
    """The turns, checked. `field` holds the first of them, or the list of all."""
    turns = list(said)
    if turns[0].role != "system" and (prompt := _text(record, "system", optional=True)):
        turns.insert(0, Turn("system", prompt))
    try:
        conversation = Conversation(tuple(turns))
        for number, turn in enumerate(turns):
            if turn.role == "user" and not turn.text.strip():
                raise TurnError(number, "the user's text is empty: fill it or drop the record")
    except TurnError as error:
        listed = record[field]
        place = f"[{error.turn - (len(turns) - len(listed))}]" if isinstance(listed, list) else ""
        raise InputError(f"field '{field}{place}': {error.reason}") from None
    return conversation


def _pair(record: Record, asked: str, answered: str) -> Iterator[Turn]:
    prompt, context = _text(record, asked), _text(record, "input", optional=True) if asked == "instruction" else ""
    yield Turn("user", f"{prompt}\n{context}" if context else prompt)
    yield Turn("assistant", _text(record, answered))


def _dialogue(record: Record, field: str) -> Iterator[Turn]:
    turns = record[field]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"field '{field}' must be a list of turns, not {_kind(turns)}")
    for number, turn in enumerate(turns):
        place = f"{field}[{number}]"
        if not isinstance(turn, dict):
            raise InputError(f"field '{place}' must be an object, not {_kind(turn)}")
        usual = ("role", "content") if field == "messages" else ("from", "value")
        role_key, text_key = next((keys for keys in (usual, *_TURN_KEYS) if keys[0] in turn), usual)
        role = _text(turn, role_key, place=f"{place}.")
        if role not in ROLES:
            raise InputError(f"field '{place}.{role_key}': unknown role '{role}': use one of {', '.join(ROLES)}")
        yield Turn(ROLES[role], _text(turn, text_key, place=f"{place}."), trained=_weight(turn, place))


_TURN_KEYS = (("role", "content"), ("from", "value"))
FORMATS: dict[tuple[str, ...], Callable[..., Iterator[Turn]]] = {
    ("messages",): _dialogue,
    ("conversations",): _dialogue,
    ("prompt", "completion"): _pair,
    ("prompt", "response"): _pair,
    ("instruction", "output"): _pair,
    ("instruction", "response"): _pair,
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
