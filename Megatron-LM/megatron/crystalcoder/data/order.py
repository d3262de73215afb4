"""Which rows are seen when: pure functions of (number of rows, seed, samples consumed before).

Nothing is iterated and nothing is remembered, so a run resumed at sample 10^9 costs what a run at sample 0 costs, and
gets the very rows that an uninterrupted run would have got.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.data.permutation import permute

OrderKind = Literal["cyclic", "single", "shuffled"]


class Order(Protocol):
    """Says which rows a rank takes; frozen dataclasses, so two orders can be compared and printed."""

    @property
    def num_rows(self) -> int:
        """Rows there are to choose from."""

    def rows(self, consumed_samples: int, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
        """Row numbers (micro_batch_size,) int64 of data-parallel rank `dp_rank`'s next micro-batch.

        `consumed_samples` were taken before it by all ranks together: 0, then micro_batch_size * dp_size, and so on.
        """

    def drawn(self, consumed_samples: int) -> tuple[int, ...]:
        """How many of the first `consumed_samples` samples each dataset gave; they add up to it."""


def make_order(kind: OrderKind, num_rows: int, *, seed: int, data_sharding: bool = True) -> Order:
    """The order called `kind` over `num_rows` rows. `seed` moves `shuffled` alone, `data_sharding` `cyclic` alone."""
    if num_rows < 1:
        raise InputError("the data holds no rows: give files with at least one")
    if kind == "cyclic":
        return CyclicOrder(num_rows, data_sharding)
    if kind == "single":
        return SingleOrder(num_rows)
    return ShuffledOrder(num_rows, seed)


class StreamOrder:
    """An order that is one global stream: sample k of the run is row `at(k)`, whoever reads it.

    Ranks take neighbouring pieces of the stream, so the rows of a global batch depend neither on the micro-batch size
    nor on the number of ranks, and no row is dropped.
    """

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Row numbers of the given positions in the stream, both int64 (k,)."""
        raise NotImplementedError

    def drawn(self, consumed_samples: int) -> tuple[int, ...]:
        """See `Order.drawn`; without a mixture, all data is one dataset."""
        return (consumed_samples,)

    def rows(self, consumed_samples: int, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
        """See `Order.rows`."""
        start = consumed_samples + dp_rank * micro_batch_size
        end = start + micro_batch_size
        first, last = start // _STRETCH, (end - 1) // _STRETCH
        pieces = [_stretch(self, number) for number in range(first, last + 1)]
        stretch = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return stretch[start - first * _STRETCH : end - first * _STRETCH].copy()


# `at` costs nearly the same for one position as for a thousand; micro-batches ask for a few at a time.
_STRETCH = 1024


@lru_cache(maxsize=64)
def _stretch(order: StreamOrder, number: int) -> np.ndarray:
    return order.at(np.arange(number * _STRETCH, (number + 1) * _STRETCH, dtype=np.int64))


@dataclass(frozen=True)
class SingleOrder(StreamOrder):
    """First row to last, again and again."""

    num_rows: int

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `StreamOrder.at`."""
        return positions % self.num_rows


@dataclass(frozen=True)
class ShuffledOrder(StreamOrder):
    """Every row once per epoch, in a fresh permutation each epoch."""

    num_rows: int
    seed: int

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `StreamOrder.at`."""
        return shuffled_cycle(positions, self.num_rows, self.seed)


def shuffled_cycle(positions: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Position k of an endless stream that runs through range(n) in a new order each time round; int64 (k,)."""
    result = np.empty_like(positions)
    cycles = positions // n
    for cycle in np.unique(cycles):
        here = cycles == cycle
        result[here] = permute(positions[here] % n, n, *key, int(cycle))
    return result


@dataclass(frozen=True)
class CyclicOrder:
    """The sampler of the instruction-tuning reference (Megatron-LM's `cyclic`), row for row.

    An epoch holds num_rows rounded down to a multiple of micro-batch x ranks; the rows left over are never seen. With
    sharding each rank owns one contiguous bucket and all ranks walk theirs in the same permutation; without, the ranks
    deal one permutation among them. The permutation is torch's, seeded with the epoch's number: no seed enters, and the
    order changes with the micro-batch size and the number of ranks. Use `shuffled` unless you must match the reference.
    """

    num_rows: int
    data_sharding: bool = True

    def drawn(self, consumed_samples: int) -> tuple[int, ...]:
        """See `Order.drawn`."""
        return (consumed_samples,)

    def rows(self, consumed_samples: int, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
        """See `Order.rows`. Raises InputError when an epoch has no full batch, or starts amid one."""
        batch = micro_batch_size * dp_size
        epoch_samples = self.num_rows - self.num_rows % batch
        if not epoch_samples:
            raise InputError(
                f"the data holds {self.num_rows} rows, fewer than the micro-batch {micro_batch_size} x {dp_size} "
                "data-parallel ranks that the cyclic order wants: take smaller micro-batches or the order `shuffled`"
            )
        epoch, offset = divmod(consumed_samples, epoch_samples)
        if offset % batch:
            raise InputError(
                f"{consumed_samples} consumed samples end amid a batch of micro-batch {micro_batch_size} x {dp_size} "
                "data-parallel ranks in the cyclic order: resume with the sizes the run began with, or start afresh"
            )
        if self.data_sharding:
            bucket = epoch_samples // dp_size
            start = offset // dp_size
            places = _torch_permutation(epoch, bucket)[start : start + micro_batch_size]
            return dp_rank * bucket + places
        # The permutation covers whole micro-batches, the epoch whole batches: its last few places may stay unused.
        places = _torch_permutation(epoch, self.num_rows - self.num_rows % micro_batch_size)
        return places[offset + dp_rank : offset + batch : dp_size]


@lru_cache(maxsize=2)
def _torch_permutation(seed: int, n: int) -> np.ndarray:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randperm(n, generator=generator).numpy()
