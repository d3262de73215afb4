"""Each format people keep conversations in becomes the same turns; bad records are told by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from data_prep.sources import FaultPolicy
from finetune.conversation import Conversation, PlainText, Turn
from finetune.sources import read_examples, read_records

TURNS = (Turn("user", "Add 1 and 2"), Turn("assistant", "3"))
WITH_SYSTEM = (Turn("system", "Be brief."), *TURNS)

RECORDS: list[tuple[dict[str, Any], tuple[Turn, ...]]] = [
    ({"prompt": "Add 1 and 2", "completion": "3", "id": 7}, TURNS),
    ({"system": "Be brief.", "prompt": "Add 1 and 2", "completion": "3"}, WITH_SYSTEM),
    ({"instruction": "Add 1 and 2", "input": "", "output": "3"}, TURNS),
    ({"instruction": "Add 1 and 2", "output": "3"}, TURNS),
    ({"instruction": "Add 1 and 2", "response": "3", "category": "sums"}, TURNS),
    ({"prompt": "Add 1 and 2", "response": "3", "text": "not read"}, TURNS),
    ({"conversations": [{"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}]}, TURNS),
    (
        {"system": "Be brief.", "messages": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
        WITH_SYSTEM,
    ),
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


def read_conversations(path: Path) -> list[Any]:
    return [example for _, example in read_examples(path, FaultPolicy())]


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
    found = [(number, line, record["a"]) for number, line, record in read_records(array)]
    assert found == [(0, "2", 1), (1, "4", 2), (2, "6", 3)]
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
        ('{"prompt": " ", "completion": "c"}', "field 'prompt': the user's text is empty"),
        ('{"prompt": "p\\ud800", "completion": "c"}', "field 'prompt' holds half of a surrogate pair"),
        ('{"messages": []}', "field 'messages' must be a list of turns, not an empty list"),
        ('{"messages": ["hi"]}', "field 'messages[0]' must be an object, not text"),
        ('{"messages": [{"role": "user"}]}', "field 'messages[0].content' is missing"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "field 'messages[0].role': unknown role 'tool'"),
        ('{"conversations": [{"from": "human", "value": "x"}]}', "the last turn is the user's"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', "'messages[0].weight' must be 0 or 1"),
        ('{"text": " "}', "field 'text' is empty"),
        ('{"token_ids": [1], "loss_mask": [2], "label_ids": [1]}', "'loss_mask' holds other numbers than 0 and 1"),
        ('{"token_ids": [1], "loss_mask": [1, 1], "label_ids": [1]}', "must be lists of integers, all of one length"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "field 'messages[1]': the user speaks twice in a row",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]}',
            "field 'messages[1]': a system turn after the first",
        ),
    ],
)
def test_a_bad_record_is_told_by_file_line_and_field(tmp_path: Path, bad: str, says: str) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text(f"{GOOD}\n\n{bad}\n")
    with pytest.raises(InputError) as error:
        list(read_conversations(lines))
    assert str(error.value).startswith(f"{lines}:3: ")
    assert says in str(error.value)

    array = tmp_path / "rows.json"
    array.write_text(f"[\n{GOOD},\n{bad}\n]")
    with pytest.raises(InputError, match=f"^{array}:[34]: "):
        list(read_conversations(array))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "c"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl:2: not UTF-8"):
        list(read_conversations(latin))
    with pytest.raises(InputError, match=r"absent\.jsonl: no such file"):
        list(read_conversations(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match=r"rows\.csv: examples are read from \.json, \.jsonl"):
        list(read_conversations(tmp_path / "rows.csv"))
    (tmp_path / "object.json").write_text('"prompt"')
    with pytest.raises(InputError, match=r"object\.json:1: an array of records is expected"):
        list(read_conversations(tmp_path / "object.json"))
    (tmp_path / "open.json").write_text(f"[{GOOD}")
    with pytest.raises(InputError, match=r"open\.json:1: not valid JSON \(',' or '\]'"):
        list(read_conversations(tmp_path / "open.json"))


def test_plain_text_weights_text_parts_and_processed_rows(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "1 and 2"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "4", "weight": 0},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "3", "weight": 1},
    ]
    records = [
        {"text": "plain"},
        {"messages": messages},
        {"token_ids": [1, 5], "loss_mask": [0, 1], "label_ids": [5, 2]},
    ]
    lines.write_text("\n".join(map(json.dumps, records)))
    text, conversation, row = read_conversations(lines)
    assert text == PlainText("plain")
    assert conversation.turns[:2] == (Turn("system", "Be brief."), Turn("user", "Add 1 and 2"))
    assert [turn.trained for turn in conversation.turns[2:]] == [False, True, True]
    assert row.planes.tolist() == [[1, 5], [0, 1], [5, 2]]


def test_every_container_gives_the_same_examples(tmp_path: Path) -> None:
    """jsonl, json, json that is lines, gzip, zstd, parquet (where a column of another format is null), txt."""
    import gzip

    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(600)] + [{"text": "plain"}]
    lines = "\n".join(map(json.dumps, records)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_bytes(lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(lines))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict.fromkeys(("prompt", "completion", "text")) | r for r in records]),
        tmp_path / "f.parquet",
    )
    expected = read_conversations(tmp_path / "a.jsonl")
    assert len(expected) == 601
    for file in sorted(tmp_path.iterdir()):
        assert read_conversations(file) == expected, file
    (tmp_path / "g.txt").write_text("one\ntwo")
    assert read_conversations(tmp_path / "g.txt") == [PlainText("one\ntwo")]
    (tmp_path / "h.parquet").write_bytes((tmp_path / "f.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"h\.parquet: is not a whole parquet file"):
        read_conversations(tmp_path / "h.parquet")


def test_bad_records_are_listed_with_skip(tmp_path: Path) -> None:
    """Also a line that is no JSON costs itself alone."""
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(GOOD.encode() + b'\n{"prompt"\n{"prompt": "p"}\n\xff\n' + GOOD.encode())
    faults = FaultPolicy("skip")
    assert [number for number, _ in read_examples(lines, faults)] == [0, 4]
    assert [fault.place for fault in faults.faults] == ["2", "3", "4"]
