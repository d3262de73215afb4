"""Each format people keep conversations in becomes the same turns; bad records are told by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from finetune.chat_format import Conversation, Turn
from finetune.sources import read_conversations, read_records

TURNS = (Turn("user", "Add 1 and 2"), Turn("assistant", "3"))
WITH_SYSTEM = (Turn("system", "Be brief."), *TURNS)

RECORDS: list[tuple[dict[str, Any], tuple[Turn, ...]]] = [
    ({"prompt": "Add 1 and 2", "completion": "3", "id": 7}, TURNS),
    ({"system": "Be brief.", "prompt": "Add 1 and 2", "completion": "3"}, WITH_SYSTEM),
    ({"instruction": "Add 1 and 2", "input": "", "output": "3"}, TURNS),
    ({"instruction": "Add 1 and 2", "output": "3"}, TURNS),
    ({"instruction": "Add", "input": "1 and 2", "output": "3"}, (Turn("user", "Add\n1 and 2"), Turn("assistant", "3"))),
    (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Add 1 and 2"},
                {"role": "assistant", "content": "3"},
            ]
        },
        WITH_SYSTEM,
    ),
    ({"conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]}, TURNS),
    (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}],
        },
        WITH_SYSTEM,
    ),
]


def test_every_format_as_jsonl_and_as_json(tmp_path: Path) -> None:
    expected = [Conversation(turns) for _, turns in RECORDS]
    records = [record for record, _ in RECORDS]
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, records)).encode())
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(records, indent=2))

    assert list(read_conversations(lines)) == expected
    assert list(read_conversations(array)) == expected


def test_a_json_array_knows_the_line_of_each_record(tmp_path: Path) -> None:
    array = tmp_path / "rows.json"
    array.write_text('\n[{"a": 1},\n\n {"a":\n 2}\n, {"a": 3}]\n')
    assert [(line, record["a"]) for line, record in read_records(array)] == [(2, 1), (4, 2), (6, 3)]
    (tmp_path / "empty.json").write_text("[]")
    assert list(read_records(tmp_path / "empty.json")) == []


GOOD = '{"prompt": "p", "completion": "c"}'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "p"', "not valid JSON"),
        ("[1]", "must be an object, not a list"),
        ('{"question": "p"}', "unknown format with the fields question"),
        ('{"prompt": "p", "completion": null}', "field 'completion' must be text, not null"),
        ('{"prompt": 3, "completion": "c"}', "field 'prompt' must be text, not a number"),
        ('{"prompt": " ", "completion": "c"}', "turn 0: the user's text is empty"),
        ('{"prompt": "p\\ud800", "completion": "c"}', "field 'prompt' holds half of a surrogate pair"),
        ('{"messages": []}', "field 'messages' must be a list of turns, not an empty list"),
        ('{"messages": ["hi"]}', "field 'messages[0]' must be an object, not text"),
        ('{"messages": [{"role": "user"}]}', "field 'messages[0].content' is missing"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "field 'messages[0].role': unknown role 'tool'"),
        ('{"conversations": [{"from": "human", "value": "x"}]}', "the last turn is the user's"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "turn 1: the user speaks twice in a row",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]}',
            "turn 1: a system turn after the first",
        ),
    ],
)
def test_a_bad_record_is_told_by_file_line_and_field(tmp_path: Path, bad: str, says: str) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f"{GOOD}\n\n{bad}\n")
    with pytest.raises(InputError) as error:
        list(read_conversations(lines))
    assert str(error.value).startswith(f"{lines}, line 3: ")
    assert says in str(error.value)

    array = tmp_path / "rows.json"
    array.write_text(f"[\n{GOOD},\n{bad}\n]")
    with pytest.raises(InputError, match=f"^{array}, line [34]: "):
        list(read_conversations(array))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "c"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 2: not UTF-8"):
        list(read_conversations(latin))
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        list(read_conversations(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match=r"rows\.csv: conversations are read from \.json and \.jsonl"):
        list(read_conversations(tmp_path / "rows.csv"))
    (tmp_path / "object.json").write_text('{"prompt": "p"}')
    with pytest.raises(InputError, match=r"object\.json, line 1: an array of records is expected"):
        list(read_conversations(tmp_path / "object.json"))
    (tmp_path / "open.json").write_text(f"[{GOOD}")
    with pytest.raises(InputError, match=r"open\.json, line 1: not valid JSON \(',' or '\]'"):
        list(read_conversations(tmp_path / "open.json"))
