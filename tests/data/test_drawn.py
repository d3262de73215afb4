"""How many samples of each dataset a run took: the orders' arithmetic against a count of every sample."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.crystalcoder.data.mixture import MixtureOrder, Source
from megatron.crystalcoder.data.order import make_order
from megatron.crystalcoder.data.reference_order import ReferenceOrder

WEIGHTS, LENGTHS = (0.6, 0.3, 0.07, 0.03), (7_000, 2_000, 30, 450)


def sources(weights: tuple[float, ...], lengths: tuple[int, ...]) -> tuple[Source, ...]:
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return tuple(Source(w, ((s, s + n),)) for w, s, n in zip(weights, starts, lengths, strict=False))


def orders(shuffle: bool) -> dict[str, MixtureOrder | ReferenceOrder]:
    return {
        "mixture": MixtureOrder(sources(WEIGHTS, LENGTHS), 3, shuffle),
        "mixture of one": MixtureOrder(sources((2.0,), (10,)), 3, shuffle),
        "lopsided mixture": MixtureOrder(sources((0.001, 0.999), (2, 5000)), 3, shuffle),
        "reference": ReferenceOrder(sources(WEIGHTS, LENGTHS), LENGTHS, 3, shuffle),
        "reference of one": ReferenceOrder(sources((2.0,), (10,)), (10,), 3, shuffle),
    }


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", orders(False))
def test_against_a_count_of_every_sample(name: str, shuffle: bool) -> None:
    """Over three epochs, at their ends, at those of blocks, and at random places: each row taken is looked up.

    Planted: the block's own samples left out; the epoch's number left out: each fails.
    """
    order = orders(shuffle)[name]
    epoch = sum(order.counts)
    rows = order.at(np.arange(3 * epoch + 1))
    ends = np.cumsum([source.num_rows for source in order.sources])
    tags = np.searchsorted(ends, rows, side="right")
    places = {0, 1, epoch - 1, epoch, epoch + 1, 3 * epoch, 1023, 1024, 1025, 4095, 4096, 4097, 8192}
    places |= set(np.random.default_rng(0).integers(0, 3 * epoch, 40).tolist())
    for place in sorted(p for p in places if p <= 3 * epoch):
        assert order.drawn(place) == tuple(np.bincount(tags[:place], minlength=len(ends)).tolist()), place
    assert sum(order.drawn(10**12 + 7)) == 10**12 + 7  # a far place costs what a near one does


def test_data_without_a_mixture_is_one_dataset() -> None:
    for kind in ("cyclic", "single", "shuffled"):
        assert make_order(kind, 9, seed=1).drawn(25) == (25,)  # type: ignore[arg-type]
