"""The order of the reference's data loader: recorded cases of it, and its arithmetic written out as lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from data_prep.subset import parse_subset
from megatron.crystalcoder.data.loader import open_data
from megatron.crystalcoder.data.mixture import Source
from megatron.crystalcoder.data.reference_order import ReferenceOrder, reference_subset
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry
from support.sequence_rows import S, V, make_rows, write_h5


def written_out(weights: list[float], lengths: list[int], seed: int, shuffle: bool, epochs: int) -> list[int]:
    """The rows of `epochs` epochs, every sample of them held in a list."""
    shares = [weight / sum(weights) for weight in weights]
    total = max(n / share for n, share in zip(lengths, shares, strict=True) if share > 0.05)
    counts = [int(total * share) for share in shares]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    each = [[int(starts[i]) + k % lengths[i] for k in range(count)] for i, count in enumerate(counts)]
    rows: list[int] = []
    for epoch in range(epochs):
        if shuffle:
            joined = [row for part in each for row in part]
            generator = torch.Generator().manual_seed(seed + epoch)
            rows += [joined[k] for k in torch.randperm(len(joined), generator=generator).tolist()]
        else:
            tags = np.repeat(np.arange(len(counts)), counts)
            np.random.default_rng(seed).shuffle(tags)
            left = [iter(part) for part in each]
            rows += [next(left[tag]) for tag in tags]
    return rows


@pytest.mark.parametrize("shuffle", [False, True])
def test_three_epochs_row_for_row(shuffle: bool) -> None:
    """Whole, from amid an epoch, and over blocks. Planted: draws that go on over epochs; the block's first count left
    out; a Feistel permutation instead of torch's: each fails."""
    weights, lengths = [0.9, 0.06, 0.04], [9000, 30, 45]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    sources = tuple(Source(w, ((s, s + n),)) for w, s, n in zip(weights, starts, lengths, strict=False))
    order = ReferenceOrder(sources, tuple(lengths), 7, shuffle)
    expected = written_out(weights, lengths, 7, shuffle, 3)
    assert sum(order.counts) * 3 == len(expected)
    positions = np.arange(len(expected))
    assert order.at(positions).tolist() == expected
    assert order.at(positions[4_000:4_200]).tolist() == expected[4_000:4_200]
    odd = np.array([len(expected) - 1, 3, 12_500, 4_500, 4_096, 4_095, 9_999, 10_000])
    assert order.at(odd).tolist() == [expected[k] for k in odd]


@pytest.mark.parametrize(
    ("subset", "rows"),
    [
        ("0.0-0.5", [*range(50, 100)]),
        ("0.0-0.1", [*range(10, 20)]),
        ("0.9-1.0", [*range(10, 20)]),
        ("0.1-0.3,0.7-1.0", [*range(20, 30), *range(60, 100)]),
        ("0.5-1.0", [*range(50, 100)]),
        ("0.0-0.29", [*range(28, 56)]),  # int(100 * 0.29) is 28 in floating point, as it was there
        ("0.0-1.0", []),  # an IndexError
        ("0.0-0.6", []),
    ],
)
def test_subsets_read_what_1_9_1_read(subset: str, rows: list[int]) -> None:
    """Recorded cases of the reference. Planted: the right meaning of a subset, fails."""
    assert [row for a, b in reference_subset(parse_subset(subset), 100) for row in range(a, b)] == rows


def test_weights_of_zero_and_small_ones(tmp_path: Path) -> None:
    """A recorded case: a weight of 0 before others makes T 200 instead of 60; no weight above 5 % ended in an error."""
    for name, n in (("a", 100), ("b", 30), ("c", 30)):
        write_h5(tmp_path / name / "x.h5", make_rows(n))

    def counts(*weights: float) -> tuple[int, ...]:
        mixture = tuple(MixtureEntry(tmp_path / name, w) for name, w in zip("abc", weights, strict=False))
        settings = DataSettings(mixture=mixture, order="mixture", reference_order=True)
        _, order = open_data(settings, seq_length=S, vocab_size=V)
        assert isinstance(order, ReferenceOrder)
        return order.counts

    assert counts(0.0, 0.5, 0.5) == (100, 100)
    assert counts(0.5, 0.5) == (100, 100)
    assert counts(0.0, 1.0) == (100,)
    many = tuple(MixtureEntry(tmp_path / "a", 1.0) for _ in range(20))
    with pytest.raises(InputError, match="more than 5 %"):
        open_data(DataSettings(mixture=many, reference_order=True), seq_length=S, vocab_size=V)


def test_files_and_subsets(tmp_path: Path) -> None:
    """From files: one directory in order and shuffled, and a mixture with phase 3's subset."""
    data = make_rows(60)
    write_h5(tmp_path / "a" / "x.h5", data[:40])
    write_h5(tmp_path / "b" / "x.h5", data[40:])
    one = DataSettings(paths=(tmp_path / "a",), order="single", seed=5, reference_order=True)
    rows, order = open_data(one, seq_length=S, vocab_size=V)
    assert order.rows(38, micro_batch_size=4, dp_rank=0, dp_size=1).tolist() == [38, 39, 0, 1]
    shuffled = DataSettings(paths=(tmp_path / "a",), order="shuffled", seed=5, reference_order=True)
    _, order = open_data(shuffled, seq_length=S, vocab_size=V)
    second = torch.randperm(40, generator=torch.Generator().manual_seed(6)).tolist()
    assert order.rows(40, micro_batch_size=40, dp_rank=0, dp_size=1).tolist() == second
    mixture = (MixtureEntry(tmp_path / "a", 0.5), MixtureEntry(tmp_path / "b", 0.5, ((0.0, 0.1),)))
    mixed = DataSettings(mixture=mixture, order="mixture", seed=1, reference_order=True)
    rows, order = open_data(mixed, seq_length=S, vocab_size=V)
    seen = [rows[k] for k in order.rows(0, micro_batch_size=80, dp_rank=0, dp_size=1).tolist()]
    tags = np.repeat([0, 1], [40, 40])
    np.random.default_rng(1).shuffle(tags)
    first, other = iter(range(40)), iter([42, 43] * 20)  # "0.0-0.1" of 20 rows: rows 2 and 3
    assert all(
        np.array_equal(row, data[next(first if tag == 0 else other)]) for row, tag in zip(seen, tags, strict=True)
    )
