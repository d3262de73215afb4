"""`data subset` copies the rows that training reads of the same `data_subset`, and whence they came."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.verification import verify
from megatron.crystalcoder.data.mixture import open_mixture
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry


@pytest.fixture
def folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in "abc":
        texts = [f"{name} {number} the quick brown fox" for number in range(ord(name) - 60)]
        (tmp_path / f"in/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize = ["tokenize", str(tmp_path / "in"), "--out", str(tmp_path / "tok"), "--tokenizer", str(tokenizer_file)]
    main([*tokenize, "--max-seq-length", "16", "--shard-mb", "0", "--rows-per-file", "40"])
    assert len(sequence_files(tmp_path / "tok")) > 3
    return tmp_path / "tok"


def rows_of(folder: Path) -> list[np.ndarray]:
    return [row for path in sequence_files(folder) for row in SequenceFile(path).rows()]


def spans_of(folder: Path) -> list[object]:
    files = [SequenceFile(path) for path in sequence_files(folder)]
    return [file.spans(number) for file in files for number in range(len(file))]


@pytest.mark.parametrize("ranges", ["0.0-0.1", "0.9-1.0", "0.1-0.3,0.7-1.0", "0-1", "0.5-0.501,0.8-0.83"])
def test_the_rows_that_training_reads(folder: Path, tmp_path: Path, ranges: str) -> None:
    """Planted: a file's own rows cut by the fractions -> other rows wherever there is more than one file, fails."""
    for out, processes in (("one", "1"), ("two", "2")):
        command = ["subset", str(folder), "--out", str(tmp_path / out), "--ranges", ranges, "--processes", processes]
        main(command)
        assert verify(tmp_path / out) == []
    everything = rows_of(folder)
    bounds = [[int(len(everything) * round(float(b) * 1000) / 1000) for b in r.split("-")] for r in ranges.split(",")]
    wanted = [number for first, stop in bounds for number in range(first, stop)]
    assert np.array_equal(rows_of(tmp_path / "one"), [everything[number] for number in wanted])
    spans = spans_of(folder)
    assert spans_of(tmp_path / "one") == [spans[number] for number in wanted]
    pairs = tuple(tuple(map(float, one.split("-"))) for one in ranges.split(","))
    settings = DataSettings(mixture=(MixtureEntry(folder, 1.0, pairs),), order="single")  # type: ignore[arg-type]
    opened, order = open_mixture(settings, seq_length=16, vocab_size=1000)
    read = [opened[int(index)] for index in order.at(np.arange(len(wanted)))]
    assert np.array_equal(rows_of(tmp_path / "one"), read)
    names = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert names == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [("0.5-0.1", "ranges rise from 0 to 1"), ("half", "write ranges like"), ("0-0.0001", "hold none: widen them")],
)
def test_refusals(folder: Path, tmp_path: Path, ranges: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(["subset", str(folder), "--out", str(tmp_path / "out"), "--ranges", ranges])
    assert not (tmp_path / "out").exists()


def test_in_a_recipe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps:\n- run: subset\n  in: tok\n  out: tenth\n  options: {ranges: 0.0-0.1}\n")
    main(["build", str(recipe), "--root", str(tmp_path), "--dry-run"])
    assert "to do" in capsys.readouterr().out
    main(["build", str(recipe), "--root", str(tmp_path)])
    assert len(rows_of(tmp_path / "tenth")) == len(rows_of(folder)) // 10
