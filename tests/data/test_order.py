"""Orders: the cyclic one against the reference's own runs, ours against their promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.data.order import Order, make_order
from megatron.crystalcoder.data.permutation import permute


def stream(order: Order, steps: int, *, m: int, dp: int, consumed: int = 0) -> list[list[list[int]]]:
    """Micro-batches of every rank: [rank][step][row]."""
    return [
        [
            order.rows(consumed + step * m * dp, micro_batch_size=m, dp_rank=rank, dp_size=dp).tolist()
            for step in range(steps)
        ]
        for rank in range(dp)
    ]


def flat(order: Order, samples: int, *, m: int, dp: int, consumed: int = 0) -> list[int]:
    """The rows of all ranks, micro-batch by micro-batch."""
    ranks = stream(order, samples // (m * dp), m=m, dp=dp, consumed=consumed)
    return [row for step in zip(*ranks, strict=True) for micro_batch in step for row in micro_batch]


def test_cyclic_is_the_reference_sampler(shared: Path) -> None:
    """Every recorded run of the reference's sampler, with its resume points and its failures.

    Planted: seed epoch + 1, offset not divided by the ranks, buckets of num_rows // dp_size: each fails.
    """
    cases = json.loads((shared / "fixtures/reference/sampler_golden.json").read_text())
    assert len(cases) == 13
    for case in cases:
        order = make_order("cyclic", case["n_rows"], seed=42, data_sharding=case.get("data_sharding", True))
        sizes = {"m": case["micro_batch"], "dp": case["dp"], "consumed": case["consumed"]}
        if "error" in case:
            with pytest.raises(InputError):
                stream(order, 1, **sizes)
        elif "first" in case:
            assert stream(order, len(case["first"]), **sizes) == [case["first"]]
        else:
            assert stream(order, len(case["order_per_rank"][0]), **sizes) == case["order_per_rank"]


def cyclic_by_iteration(n: int, m: int, dp: int, rank: int, sharding: bool) -> list[list[int]]:
    """Two epochs of the cyclic order told as a loop: shuffle with the epoch as seed, deal, batch."""
    batches = []
    per_epoch = n // (m * dp)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(epoch)
        if sharding:
            mine = [rank * per_epoch * m + x for x in torch.randperm(per_epoch * m, generator=generator).tolist()]
        else:
            mine = torch.randperm(n // m * m, generator=generator).tolist()[rank::dp]
        batches += [mine[m * i : m * i + m] for i in range(per_epoch)]
    return batches


@pytest.mark.parametrize("sharding", [True, False])
@pytest.mark.parametrize(("n", "m", "dp"), [(17, 1, 1), (40, 2, 2), (41, 3, 4), (64, 4, 2), (9, 2, 4)])
def test_cyclic_is_what_it_says(n: int, m: int, dp: int, sharding: bool) -> None:
    """Against the loop above, over two epochs. Planted: ranks' buckets swapped, fails."""
    order = make_order("cyclic", n, seed=0, data_sharding=sharding)
    steps = 2 * (n // (m * dp))
    assert stream(order, steps, m=m, dp=dp) == [cyclic_by_iteration(n, m, dp, rank, sharding) for rank in range(dp)]


def test_cyclic_names_the_remedy() -> None:
    """Too few rows, and a resume with other sizes."""
    with pytest.raises(InputError, match=r"3 rows.*shuffled"):
        make_order("cyclic", 3, seed=0).rows(0, micro_batch_size=2, dp_rank=0, dp_size=2)
    with pytest.raises(InputError, match="6 consumed samples"):
        make_order("cyclic", 100, seed=0).rows(6, micro_batch_size=2, dp_rank=0, dp_size=2)
    with pytest.raises(InputError, match="no rows"):
        make_order("shuffled", 0, seed=0)


def test_single_runs_through_the_rows_again_and_again() -> None:
    order = make_order("single", 5, seed=3)
    assert flat(order, 12, m=2, dp=2) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 257])
def test_shuffled_sees_every_row_once_an_epoch(n: int) -> None:
    """No row dropped, in any epoch, whatever the batch; epochs and seeds differ.

    Planted: the epoch left out of the key, `n - n % 4` rows an epoch: both fail.
    """
    rows = flat(make_order("shuffled", n, seed=7), 4 * n * 4, m=1, dp=1)
    epochs = [rows[i : i + n] for i in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 100:
        other = flat(make_order("shuffled", n, seed=8), n, m=1, dp=1)
        assert len({tuple(epoch) for epoch in [*epochs, other, range(n)]}) == 6


@pytest.mark.parametrize("kind", ["single", "shuffled"])
def test_global_batches_do_not_depend_on_the_layout(kind: str) -> None:
    """The rows of each global batch of 12 are the same for every micro-batch size and number of ranks, and in order.

    Planted: each rank takes every dp-th sample: fails.
    """
    order = make_order(kind, 50, seed=1)  # type: ignore[arg-type]
    expected = flat(order, 240, m=1, dp=1)
    for m, dp in [(12, 1), (1, 12), (3, 4), (2, 3), (6, 2)]:
        assert flat(order, 240, m=m, dp=dp) == expected


@pytest.mark.parametrize(("kind", "m", "dp"), [("cyclic", 2, 2), ("single", 3, 2), ("shuffled", 3, 2)])
def test_resumed_anywhere_the_stream_is_the_same(kind: str, m: int, dp: int) -> None:
    """A new object asked at any step gives what the uninterrupted stream gives there, in whatever order it is asked."""
    whole = stream(make_order(kind, 31, seed=5), 40, m=m, dp=dp)  # type: ignore[arg-type]
    for step in [37, 3, 39, 0, 20]:
        resumed = stream(make_order(kind, 31, seed=5), 1, m=m, dp=dp, consumed=step * m * dp)  # type: ignore[arg-type]
        assert resumed == [[rank[step]] for rank in whole]


@pytest.mark.parametrize("n", [1, 2, 5, 99, 100, 101, 1000, 65_537])
def test_permute_is_a_permutation(n: int) -> None:
    assert sorted(permute(np.arange(n), n, 4, 2).tolist()) == list(range(n))


def test_permute_shuffles_well() -> None:
    """Over 20,000 keys a row lands everywhere equally often, and neighbours are not kept together.

    Chi-square of 100 cells has mean 99 and standard deviation 14: below 170 is five of them. Planted: 2 rounds in place
    of 8: chi-square 1.8e5, fails.
    """
    n, keys = 100, 20_000
    places = np.array([permute(np.array([17, 18]), n, 0, key) for key in range(keys)])
    for values in (places[:, 0], places[:, 1], (places[:, 1] - places[:, 0]) % n):
        seen = Counter(values.tolist())
        cells = range(1, n) if 0 not in seen else range(n)  # the distance of two rows is never 0
        expected = keys / len(cells)
        assert sum((seen[cell] - expected) ** 2 / expected for cell in cells) < 170


def test_permute_is_the_same_for_ever() -> None:
    """Golden values: another order would silently break every resumed run."""
    assert permute(np.arange(10), 10, 1, 0).tolist() == [5, 8, 3, 1, 0, 6, 2, 4, 7, 9]
    far = permute(np.array([0, 10**11, 10**12 - 1]), 10**12, 1, 0)
    assert far.tolist() == [252522513125, 867380022558, 202015825449]
