"""Shuffling moves every sequence once, anywhere, and the seed alone decides where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from data_prep.permutation import Permutation
from data_prep.provenance import Span
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from data_prep.shuffle import shuffle
from data_prep.spill import write_spill


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


@pytest.mark.parametrize("block_bytes", [1, 3000, 20_000])
def test_bounded_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """One row at a time, some, and more than there are: the same rows, and the same documents with each of them.

    Planted: spans left in the order of the spill files (no take(order)), and a source's whole table for a part of its
    rows (no take(np.arange(start, stop))) -> other documents, both fail.
    """
    start = 0
    for number, size in enumerate([40, 0, 30, 1, 40, 0]):
        with SequenceWriter(tmp_path / f"in/examples_{number}_0.h5", 8) as writer:
            for row in range(start, start + size):
                spans = [Span(f"{number}.jsonl", row, at) for at in range(row % 3)]
                writer.write(np.full((1, 3, 8), row, np.int32), [spans])
        start += size
    shuffle([tmp_path / "in"], tmp_path / "a", files=2, seed=1)
    monkeypatch.setattr("data_prep.shuffle.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("data_prep.shuffle.STRETCH_BYTES", 1)
    shuffle([tmp_path / "in"], tmp_path / "b", files=2, seed=1)
    assert not list((tmp_path / "b").glob(".*"))
    assert order_of(tmp_path / "a") == order_of(tmp_path / "b")
    for folder in ("a", "b"):
        for path in sequence_files(tmp_path / folder):
            file = SequenceFile(path)
            for number, row in enumerate(file.rows()):
                found = int(row[0, 0])
                source = 0 if found < 40 else 2 if found < 70 else 3 if found < 71 else 4
                assert file.spans(number) == [Span(f"{source}.jsonl", found, at) for at in range(found % 3)]


IN_A_FRESH_PROCESS = """
import resource, sys
from pathlib import Path
import data_prep.shuffle as step
step.BLOCK_BYTES = 4 << 20
step.shuffle([Path(sys.argv[1])], Path(sys.argv[3]), files=1, seed=0)  # all is imported now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step.shuffle([Path(sys.argv[2])], Path(sys.argv[4]), files=1, seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes on Linux only")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """80 MB into one file, in blocks of 4 MB, take less than half of it.

    Planted: no `madvise` -> what was read of the spill files stays, 58 MB; blocks of 192 MB -> 62 MB, both fail.
    """
    generator = np.random.default_rng(0)
    for name, count in (("few", 10), ("many", 3400)):
        with SequenceWriter(tmp_path / name / "a.h5", 2048) as writer:
            for _ in range(count):
                writer.write(generator.integers(0, 2**31, (1, 3, 2048), np.int32))
    folders = [str(tmp_path / name) for name in ("few", "many", "out_few", "out_many")]
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("left", [10, -5])
def test_killed_while_spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """A spill file that is cut off, and has no record of its task, is written anew.

    Planted: opened to append -> what the killed run has left is read, fails.
    """
    write_files(tmp_path / "in", [40, 30])
    monkeypatch.setattr("data_prep.shuffle.BLOCK_BYTES", 2000)
    monkeypatch.setattr("data_prep.shuffle.STRETCH_BYTES", 1)
    shuffle([tmp_path / "in"], tmp_path / "whole", files=3, seed=5)
    number = iter(range(3))

    def die(path: Path, *rows: Any) -> None:
        write_spill(path, *rows)
        if next(number, None) is None:
            path.write_bytes(path.read_bytes()[:left])
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("data_prep.shuffle.write_spill", die)
        with pytest.raises(Killed):
            shuffle([tmp_path / "in"], tmp_path / "out", files=3, seed=5)
    assert len(list((tmp_path / "out/.tasks").glob("*.rows"))) == 4
    shuffle([tmp_path / "in"], tmp_path / "out", files=3, seed=5)
    for path in sequence_files(tmp_path / "whole"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


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
