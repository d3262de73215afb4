"""`verify` finds what is wrong, each fault planted in turn, and nothing where nothing is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.commands import main
from data_prep.sequences import SequenceFile, SequenceWriter
from data_prep.shuffle import shuffle
from data_prep.verification import faults_of, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished shuffle of 40 sequences in two files."""
    stream = np.random.default_rng(0).integers(3, 100, 40 * 16 + 1).astype(np.int32)
    rows = np.ones((40, 3, 16), np.int32)
    rows[:, 0], rows[:, 2] = stream[:-1].reshape(40, 16), stream[1:].reshape(40, 16)
    rows[-1, 1, 5:] = 0
    with SequenceWriter(tmp_path / "in/a.h5", 16) as writer:
        writer.write(rows)
    shuffle([tmp_path / "in"], tmp_path / "out", files=2, seed=0)
    return tmp_path / "out"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    rows = change(np.stack(list(SequenceFile(path).rows())))
    with SequenceWriter(path, rows.shape[2]) as writer:
        writer.write(rows)


def test_nothing_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder) == []
    assert verify(folder / "data-00000.h5", 100) == []
    main(["verify", str(folder)])
    assert "nothing wrong" in capsys.readouterr().out


def shifted(rows: np.ndarray) -> np.ndarray:
    rows[3, 2] = rows[3, 0]
    return rows


def negative(rows: np.ndarray) -> np.ndarray:
    rows[2, 0, 0] = -1
    return rows


def odd_mask(rows: np.ndarray) -> np.ndarray:
    rows[1, 1, 4] = 2
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "data-00000.h5: row 3: position "),
        (negative, "data-00000.h5: row 2: ids from -1"),
        (odd_mask, "data-00000.h5: row 1: loss mask holds 2"),
        (lambda rows: rows[:-1], "data-00000.h5: has rows 19, not 20 as stated"),
        (lambda rows: np.concatenate([rows[:-1], rows[:1]]), "data-00000.h5: has a checksum of the rows of"),
    ],
)
def test_faults_are_named(folder: Path, change: Callable, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder / "data-00000.h5", change)
    assert message in "\n".join(verify(folder))
    with pytest.raises(SystemExit) as done:
        main(["verify", str(folder)])
    assert done.value.code == 1
    assert message in capsys.readouterr().out


def test_files_are_compared(folder: Path) -> None:
    assert "ids from" in verify(folder, 50)[0]
    shutil.copy(folder / "data-00000.h5", folder / "data-00002.h5")
    assert "data-00002.h5: is not in the manifest" in verify(folder)[0]
    (folder / "data-00002.h5").unlink()
    rewrite(folder.parent / "in/a.h5", lambda rows: rows[:-1])
    assert "does not hold the rows of its inputs" in verify(folder)[0]
    (folder / "data-00001.h5").rename(folder / "data-00001.h5.partial")
    assert ["is incomplete" in fault or "is missing" in fault for fault in verify(folder)] == [True, True]
    content = (folder / "data-00000.h5").read_bytes()
    (folder / "data-00000.h5").write_bytes(content[: len(content) // 2])
    assert "not a readable HDF5" in verify(folder)[0]


def test_rows_of_conversations_are_well_formed() -> None:
    """A loss mask with holes: labels are checked where they count, padding is not."""
    row = np.array([[5, 6, 7, 8, 0], [0, 1, 0, 1, 0], [6, 7, 8, 9, 0]], np.int32)
    assert faults_of(row) == []
    row[2, 1] = 3
    assert "position 1: label 3, but token 7" in faults_of(row)[0]
