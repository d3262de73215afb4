"""`crystalcoder finetune prepare` and `show` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_prep.sequences import SequenceFile
from finetune.chat_format import DEFAULT_SYSTEM_PROMPT, Conversation, Turn, encode
from finetune.packing import PackedRows
from finetune.show import runs, show
from tools.cli import main

SEQ_LENGTH = 48


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"Add {i} and {i + 1}", "completion": f"The sum is {2 * i + 1}."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def run(*arguments: object) -> int:
    """Exit status of `crystalcoder finetune ...`."""
    with pytest.raises(SystemExit) as status:
        main(["finetune", *map(str, arguments)])
    return int(status.value.code or 0)


def rows_of(folder: Path) -> np.ndarray:
    with SequenceFile(folder / "data-00000.h5") as file:
        return np.stack(list(file.rows()))


def test_prepare_writes_every_packed_row_once_shuffled(
    tmp_path: Path, pairs: Path, tokenizer_file: Path, tokenizer
) -> None:
    out = tmp_path / "rows"
    options = ("--out", out, "--tokenizer", tokenizer_file, "--max-seq-length", SEQ_LENGTH)
    assert run("prepare", pairs, *options) == 0
    rows = rows_of(out)

    conversations = [
        Conversation(
            (
                Turn("system", DEFAULT_SYSTEM_PROMPT),
                Turn("user", f"Add {i} and {i + 1}"),
                Turn("assistant", f"The sum is {2 * i + 1}."),
            )
        )
        for i in range(40)
    ]
    packed = PackedRows(encode(conversations, tokenizer), seq_length=SEQ_LENGTH, pad_id=tokenizer.eos_id)
    expected = [packed[i] for i in range(len(packed))]
    assert rows.shape == (len(expected), 3, SEQ_LENGTH)
    assert sorted(r.tobytes() for r in rows) == sorted(r.tobytes() for r in expected)
    assert any((a != b).any() for a, b in zip(rows, expected, strict=True)), "the rows are not shuffled"

    again = tmp_path / "again"
    assert run("prepare", pairs, "--out", again, *options[2:]) == 0
    np.testing.assert_array_equal(rows_of(again), rows)
    assert run("prepare", pairs, "--out", again, *options[2:], "--seed", 2, "--system", "") == 0
    assert len(rows_of(again)) < len(rows)


def test_bad_input_exits_with_2_and_writes_nothing(
    tmp_path: Path, pairs: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows"
    options = ("--out", out, "--tokenizer", tokenizer_file, "--max-seq-length", SEQ_LENGTH)
    with pairs.open("a") as file:
        file.write('\n{"prompt": "x"}\n')
    assert run("prepare", pairs, *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {pairs}:41: unknown format with the fields prompt")
    (tmp_path / "none.jsonl").write_text("\n")
    assert run("prepare", tmp_path / "none.jsonl", *options) == 2
    assert "no assistant token to train on" in capsys.readouterr().err
    assert not out.exists()


def test_show_marks_what_is_trained(tmp_path: Path, pairs: Path, tokenizer_file: Path, tokenizer) -> None:
    out = tmp_path / "rows"
    assert run("prepare", pairs, "--out", out, "--tokenizer", tokenizer_file, "--max-seq-length", 512) == 0
    row = rows_of(out)[0]
    shown = list(runs(row, tokenizer))
    assert "".join(r.text for r in shown).count(DEFAULT_SYSTEM_PROMPT) >= 1
    answers = [r.text for r in shown if r.trained and not r.is_control]
    assert any(a.startswith("The sum is ") and a.endswith(".") for a in answers)
    assert {r.text for r in shown if r.trained and r.is_control} == {"</s>"}

    console = Console(record=True, width=200, color_system=None)
    show(out, tokenizer, console, start=0, count=2)
    text = console.export_text()
    assert "row 0: 512 positions" in text
    assert "row 1: 512 positions" in text
    assert "⟦The sum is" in text

    processed = tmp_path / "rows.jsonl"
    processed.write_text(json.dumps(dict(zip(("token_ids", "loss_mask", "label_ids"), row.tolist(), strict=True))))
    again = Console(record=True, width=200, color_system=None)
    show(processed, tokenizer, again, start=0, count=1)
    first_row = text[: text.index("─", text.index("\n"))].splitlines()
    told = [line for line in first_row if line.startswith("-- pairs.jsonl #")]
    assert len(told) > 1  # processed rows do not say where they come from
    assert again.export_text().splitlines() == [line for line in first_row if line not in told]


def test_show_notes_another_tokenizer(
    tmp_path: Path, pairs: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "rows", tmp_path / "tokenizer.json"
    assert run("prepare", pairs, "--out", out, "--tokenizer", tokenizer_file, "--valid", 0.3) == 0
    other.write_text(tokenizer_file.read_text() + "\n")
    capsys.readouterr()
    for path in (out, out / "valid", out / "data-00000.h5"):
        assert run("show", path, "--tokenizer", tokenizer_file) == 0
        assert not capsys.readouterr().err
        assert run("show", path, "--tokenizer", other) == 0
        assert "was made with another tokenizer.json" in capsys.readouterr().err


def test_show_tells_what_it_cannot_read(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"token_ids": [1, 2], "loss_mask": [1')
    assert run("show", broken, "--tokenizer", tokenizer_file) == 2
    assert "rows.jsonl, line 1: not a processed row" in capsys.readouterr().err
    broken.write_text('{"token_ids": [1, 2], "loss_mask": [1, 1], "label_ids": [2, 3]}')
    assert run("show", broken, "--tokenizer", tokenizer_file, "--start", 3) == 2
    assert "has no row 3" in capsys.readouterr().err
