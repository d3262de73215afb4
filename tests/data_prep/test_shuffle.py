"""Shuffling moves every sequence once, anywhere, and the seed alone decides where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from data_prep.shuffle import Permutation, shuffle


def write_files(folder: Path, sizes: list[int], length: int = 8) -> np.ndarray:
    """Files of the given sizes; every sequence is told by its first token."""
    rows = np.zeros((sum(sizes), 3, length), np.int32)
    rows[:, 0, 0] = np.arange(len(rows))
    start = 0
    for number, size in enumerate(sizes):
        with SequenceWriter(folder / f"part{number % 2}" / f"examples_{number}_0.h5", length) as writer:
            writer.write(rows[start : start + size])
        start += size
    return rows


def order_of(folder: Path) -> list[int]:
    return [int(row[0, 0]) for path in sequence_files(folder) for row in SequenceFile(path).rows()]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40))
def test_permutation(size: int, seed: int) -> None:
    """Planted: no walk back below n -> numbers repeat, fails."""
    values = Permutation(size, seed)(np.arange(size))
    assert np.array_equal(np.sort(values), np.arange(size))


def test_permutation_is_random() -> None:
    """Every sequence lands in every tenth equally often, and neighbours are parted (chi-squared, 1e-6 level)."""
    size, seeds = 1000, 400
    table = np.stack([Permutation(size, seed)(np.arange(size)) for seed in range(seeds)])
    tenths = np.stack([np.bincount(table[:, position] * 10 // size, minlength=10) for position in range(size)])
    statistic = ((tenths - seeds / 10) ** 2 / (seeds / 10)).sum()
    freedom = 9 * size
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)
    steps = np.abs(np.diff(table, axis=1))
    assert abs((steps == 1).mean() - 2 / size) < 5 * np.sqrt(2 / size / steps.size)
    fixed = (table == np.arange(size)).sum()
    assert abs(fixed - seeds) < 5 * np.sqrt(seeds)


def test_every_sequence_once(tmp_path: Path) -> None:
    write_files(tmp_path / "in", [50, 0, 3, 120, 1])
    manifest = shuffle([tmp_path / "in"], tmp_path / "a", files=3, seed=5)
    assert [(name, file["rows"]) for name, file in manifest["outputs"].items()] == [
        (f"data-{number:05d}.h5", 58) for number in range(3)
    ]
    order = order_of(tmp_path / "a")
    assert sorted(order) == list(range(174))
    assert order != sorted(order)
    shuffle([tmp_path / "in"], tmp_path / "b", files=3, seed=5, processes=2)
    for name in ("data-00000.h5", "data-00001.h5", "data-00002.h5"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    shuffle([tmp_path / "in"], tmp_path / "c", files=1, seed=6)
    assert order_of(tmp_path / "c") != order
    # The order is of sequences, not of files: other cuts, same order.
    shuffle([tmp_path / "in"], tmp_path / "d", files=7, seed=5)
    assert order_of(tmp_path / "d") == order


def test_bounded_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "in", [40, 40, 40])
    shuffle([tmp_path / "in"], tmp_path / "a", files=2, seed=1)
    monkeypatch.setattr("data_prep.shuffle.BLOCK_BYTES", 12 * 8 * 7)
    monkeypatch.setattr("data_prep.shuffle.OPEN_FILES", 1)
    shuffle([tmp_path / "in"], tmp_path / "b", files=2, seed=1)
    assert order_of(tmp_path / "a") == order_of(tmp_path / "b")


def test_refusals(tmp_path: Path) -> None:
    write_files(tmp_path / "in", [5])
    write_files(tmp_path / "other", [5], length=9)
    inside = tmp_path / "in"
    for inputs, out, files, message in [
        ([inside], tmp_path / "x", 6, "there are 5 sequences"),
        ([inside], tmp_path / "x", 0, "there are 5 sequences"),
        ([inside, tmp_path / "other"], tmp_path / "x", 1, "sequences of 9, but"),
        ([inside, inside], tmp_path / "x", 1, "named twice"),
        ([inside], inside, 1, "lies among the inputs"),
        ([tmp_path / "none"], tmp_path / "x", 1, "no such file or folder"),
    ]:
        with pytest.raises(InputError, match=message):
            shuffle(inputs, out, files=files, seed=0)
    assert not (tmp_path / "x").exists()
