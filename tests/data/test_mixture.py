"""Mixtures: the epoch rule, subsets, proportions, and one stream whatever asks for it."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.subset import parse_subset, subset_ranges
from megatron.crystalcoder.data.loader import open_data
from megatron.crystalcoder.data.mixture import MixtureOrder, Source, epoch_counts
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry
from support.sequence_rows import S, V, make_rows, write_h5


def make_mixture(weights: list[float], lengths: list[int], *, seed: int = 1, shuffle: bool = False) -> MixtureOrder:
    """Datasets one after the other: the first has rows 0 to lengths[0] - 1, and so on."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    sources = [
        Source(weight, ((start, start + n),)) for weight, start, n in zip(weights, starts, lengths, strict=False)
    ]
    return MixtureOrder(tuple(sources), seed, shuffle)


PHASE_1 = [
    0.043251179622600486, 0.0413121881861869, 0.2665010054745754, 0.5334581653397988,
    0.04962588209760537, 0.03168034115317788, 0.03417123812605512,
]  # fmt: skip
LENGTHS = [1_000, 900, 7_000, 12_345, 1_100, 700, 650]


def test_epoch_length_follows_the_largest_sets() -> None:
    """T = max length / weight over the sets above 5 %; each gives int(T * weight).

    The first line is a recorded case of the reference. Planted: >= 5 %: fails.
    """
    assert epoch_counts([0.9, 0.06, 0.04], [100, 30, 20]) == [450, 30, 20]
    assert epoch_counts([90, 6, 4], [100, 30, 20]) == [450, 30, 20]
    assert epoch_counts([0.5, 0.5], [60, 20]) == [60, 60]
    assert epoch_counts([0.95, 0.05], [95, 1000]) == [95, 5]  # exactly 5 % does not count
    assert epoch_counts([1.0] * 30, [10] * 29 + [20]) == [20] * 30  # none above 5 %: all count
    assert epoch_counts([0.999999, 0.000001], [10, 10]) == [10, 1]  # never none at all


@pytest.mark.parametrize(
    ("subset", "ranges"),
    [
        ("0.0-0.5", [(0, 50)]),
        ("0.0-0.1", [(0, 10)]),
        ("0.9-1.0", [(90, 100)]),
        ("0.1-0.3,0.7-1.0", [(10, 30), (70, 100)]),
        ("0.0-1.0", [(0, 100)]),
        ("0.5-1.0", [(50, 100)]),
        ("0.28-0.29", [(28, 29)]),  # 0.29 * 100 is 28.999... in floating point
        ("0-0.001", []),
    ],
)
def test_subsets_keep_the_rows_they_name(subset: str, ranges: list[tuple[int, int]]) -> None:
    """The reference's first release kept what it should skip. Planted: kept and skipped swapped, fails."""
    assert subset_ranges(parse_subset(subset), 100) == ranges


@pytest.mark.parametrize("text", ["", "0.5", "0.5-0.1", "0-1.5", "0.0-0.5,0.4-1.0", "a-b", "0.1-0.1", "-0.1-0.5"])
def test_a_wrong_subset_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="data_subset"):
        parse_subset(text)


def test_an_epoch_has_exact_counts_and_every_stretch_has_the_proportions() -> None:
    """Counts of an epoch exactly; of any prefix within one block's width; per block boundary within one sample.

    Planted: block share rounded on its own (not cumulatively): the epoch's counts miss by 18, fails.
    """
    order = make_mixture(PHASE_1, LENGTHS)
    length = sum(order.counts)
    tags, _ = order.draws(np.arange(2 * length))
    for epoch in (tags[:length], tags[length:]):
        assert tuple(np.bincount(epoch)) == order.counts
    assert not np.array_equal(tags[:length], tags[length:])  # epochs are ordered anew
    shares = np.array(order.counts) / length
    for end in range(1024, length, 1024):
        assert np.abs(np.bincount(tags[:end], minlength=7) - shares * end).max() < 1
    assert abs(np.bincount(tags[5_000:9_000]) / 4_000 - shares).max() < 0.02


def test_proportions_of_a_long_run() -> None:
    """10,000 batches of 16: within 0.1 % of the normalised weights."""
    order = make_mixture(PHASE_1, LENGTHS)
    tags, _ = order.draws(np.arange(160_000))
    assert np.abs(np.bincount(tags) / 160_000 - np.array(PHASE_1) / sum(PHASE_1)).max() < 1e-3


@pytest.mark.parametrize(("shuffle", "digest"), [(False, "207c08dc0cf08d92"), (True, "b9c0c518e6543d11")])
def test_an_order_stays_what_it_was(shuffle: bool, digest: str) -> None:
    """The first 100,000 rows, for ever, whatever machine and library versions: a run can be continued years later."""
    rows = make_mixture(PHASE_1, LENGTHS, shuffle=shuffle).at(np.arange(100_000))
    assert hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=8).hexdigest() == digest


@pytest.mark.parametrize("shuffle", [False, True])
def test_draws_go_through_each_dataset(shuffle: bool) -> None:
    """Within a dataset: row after row (or a permutation per pass), going on where the last epoch left off.

    Planted: draws restarted each epoch: the rows after the first epoch's share are never seen, fails.
    """
    order = make_mixture([0.9, 0.06, 0.04], [100, 30, 45], shuffle=shuffle)
    rows = order.at(np.arange(5 * sum(order.counts)))
    for first, end in ((0, 100), (100, 130), (130, 175)):
        mine = rows[(rows >= first) & (rows < end)] - first
        size = end - first
        passes = [mine[i : i + size].tolist() for i in range(0, len(mine) - size + 1, size)]
        assert len(passes) >= 2
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert all((one == list(range(size))) is not shuffle for one in passes)


def test_every_draw_number_is_taken_once_in_order() -> None:
    """A direct count over three epochs agrees with the arithmetic. Planted: block's first draw off by one, fails."""
    order = make_mixture(PHASE_1, LENGTHS, seed=4)
    tags, draws = order.draws(np.arange(3 * sum(order.counts)))
    for tag in range(7):
        assert np.array_equal(draws[tags == tag], np.arange(3 * order.counts[tag]))


@pytest.mark.parametrize(
    ("weights", "lengths"), [([1.0], [3]), ([0.001, 0.999], [2, 5000]), ([0.5, 0.5, 1e-6], [9, 4, 2])]
)
def test_small_and_lopsided_mixtures_hold_together(weights: list[float], lengths: list[int]) -> None:
    order = make_mixture(weights, lengths)
    tags, draws = order.draws(np.arange(2 * sum(order.counts)))
    for tag, count in enumerate(order.counts):
        assert np.array_equal(draws[tags == tag], np.arange(2 * count))


def test_the_stream_can_be_entered_anywhere_and_dealt_to_any_layout() -> None:
    """Single positions, far ones first, and global batches over ranks: all pieces of one stream."""
    order = make_mixture(PHASE_1, LENGTHS, shuffle=True)
    whole = order.at(np.arange(60_000))
    again = make_mixture(PHASE_1, LENGTHS, shuffle=True)
    for position in (59_999, 1_023, 1_024, 0, 23_694, 23_695, 40_000):
        assert again.at(np.array([position])) == whole[position]
    for m, dp in ((1, 8), (4, 2), (8, 1), (2, 4)):
        dealt = [
            again.rows(1_000 + step, micro_batch_size=m, dp_rank=rank, dp_size=dp)
            for step in range(0, 240, m * dp)
            for rank in range(dp)
        ]
        assert np.array_equal(np.concatenate(dealt), whole[1_000:1_240])
    for start, size in ((1_000, 3_000), (1_020, 8), (1_024, 1_024)):  # over the seams of what is computed at once
        assert np.array_equal(
            again.rows(start, micro_batch_size=size, dp_rank=0, dp_size=1), whole[start : start + size]
        )
    assert len(order.at(np.array([10**15, 10**15 + 1]))) == 2  # a far position costs what a near one costs
    assert not np.array_equal(make_mixture(PHASE_1, LENGTHS, seed=2).at(np.arange(100)), whole[:100])


def test_a_mixture_of_files(tmp_path: Path) -> None:
    """Directories, subsets and a weight of zero: exactly the rows that the settings name, in proportion."""
    data = make_rows(175)
    for name, first, end in (("a", 0, 100), ("b", 100, 130), ("c", 130, 175)):
        write_h5(tmp_path / name / "data-00000.h5", data[first:end])
    mixture = (
        MixtureEntry(tmp_path / "missing", 0.0),  # a weight of zero is dropped before anything is opened
        MixtureEntry(tmp_path / "a", 0.6, ((0.0, 0.1), (0.5, 0.6))),
        MixtureEntry(tmp_path / "b", 0.2),
        MixtureEntry(tmp_path / "c", 0.2, ((0.2, 1.0),)),
    )
    rows, order = open_data(DataSettings(mixture=mixture, order="mixture"), seq_length=S, vocab_size=V)
    assert isinstance(order, MixtureOrder)
    assert order.num_rows == 20 + 30 + 36
    assert order.counts == (108, 36, 36)
    seen = Counter(order.at(np.arange(180)).tolist())
    assert set(seen) == {*range(10), *range(50, 60), *range(100, 130), *range(139, 175)}
    assert all(np.array_equal(rows[i], data[i]) for i in seen)


def test_a_wrong_mixture_is_refused(tmp_path: Path) -> None:
    write_h5(tmp_path / "a" / "x.h5", make_rows(5))
    for entries, message in (
        ((MixtureEntry(tmp_path / "a", -0.1),), "weight -0.1"),
        ((MixtureEntry(tmp_path / "a", float("nan")),), "weight nan"),
        ((MixtureEntry(tmp_path / "a", 0.0),), "above 0"),
        ((MixtureEntry(tmp_path / "a", 1.0, ((0.0, 0.1),)),), "holds none"),
        ((MixtureEntry(tmp_path / "missing", 1.0),), "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            open_data(DataSettings(mixture=entries), seq_length=S, vocab_size=V)
