"""The order of modelzoo 1.9.1's map-style data loader, sample for sample, for a run that must be reproduced.

Its mixture is one epoch that repeats: int(T * weight) samples of each dataset, shuffled once by numpy's default_rng
with `shuffle_seed`, each dataset's rows in turn modulo its length and from the first again in the next epoch. With
`shuffle` the datasets stand one after the other and torch.randperm, seeded with shuffle_seed + epoch, orders them.

Its mistakes are kept: `data_subset` takes as many rows as it names, but changes kept and skipped stretches; a weight of
0 before other datasets pairs weights with the wrong lengths in T. Where it ended in an error, InputError is raised. One
thing cannot be kept: it read a directory's files in the order of the file system; here they are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data_prep.errors import InputError
from data_prep.subset import format_subset
from megatron.crystalcoder.data.mixture import Source, check_weights
from megatron.crystalcoder.data.order import Order, StreamOrder
from megatron.crystalcoder.data.rows import Rows, open_rows
from megatron.crystalcoder.training.config import DataSettings

_WHOLE = ((0.0, 1.0),)
_BLOCK = 4096


def open_reference(settings: DataSettings, *, seq_length: int, vocab_size: int) -> tuple[Rows, Order]:
    """Open the data of `settings` in the reference's order; `settings.order` "shuffled" is its `shuffle: True`.

    Raises InputError as `open_mixture` does, and for what ends the reference in an error: no weight above 5 %, a
    data_subset that reaches past the rows.
    """
    shuffle = settings.order == "shuffled"
    if not settings.mixture:
        rows = open_rows(settings.paths, seq_length=seq_length, vocab_size=vocab_size)
        whole = Source(1.0, ((0, len(rows)),))
        return rows, ReferenceOrder((whole,), (len(rows),), settings.seed, shuffle)
    check_weights(settings.mixture)
    parts = [open_rows([entry.data_dir], seq_length=seq_length, vocab_size=vocab_size) for entry in settings.mixture]
    sources, start = [], 0
    for entry, part in zip(settings.mixture, parts, strict=True):
        ranges = reference_subset(entry.subset, len(part)) if entry.subset != _WHOLE else [(0, len(part))]
        if not ranges:
            raise InputError(
                f"{entry.data_dir}: data_subset {format_subset(entry.subset)} of {len(part)} rows cannot be read by "
                "release 1.9.1: choose another, or drop --reference-order"
            )
        sources.append(Source(entry.weight, tuple((start + first, start + end) for first, end in ranges)))
        start += len(part)
    # The lengths of all datasets beside the weights of those that have one: what 1.9.1 computes T from.
    lengths = tuple(source.num_rows for source in sources)
    kept = tuple(source for source in sources if source.weight > 0)
    order = ReferenceOrder(kept, lengths[: len(kept)], settings.seed, shuffle)
    order.counts  # noqa: B018 - says now if there is no weight above 5 %
    return Rows([file for part in parts for file in part.files]), order


def reference_subset(subset: Sequence[tuple[float, float]], num_rows: int) -> list[tuple[int, int]]:
    """The half-open row ranges that 1.9.1 reads for `subset`; empty where it ends in an IndexError.

    Row i of the subset is row i + (rows named so far), the step after each gap: kept and skipped changed places.
    """
    kept, skipped, previous = [0], [0], 0.0
    for first, end in (*subset, (1.0, 1.0)):
        kept.append(kept[-1] + int(num_rows * end) - int(num_rows * first))
        skipped.append(skipped[-1] + int(num_rows * first) - int(num_rows * previous))
        previous = end
    length, ranges = kept[-1], []
    for before, gap_end, offset in zip(skipped, skipped[1:], kept[1:], strict=False):
        first, end = min(before, length), min(gap_end, length)
        if first < end:
            ranges.append((first + offset, end + offset))
    return ranges if skipped[-1] >= length else []


@dataclass(frozen=True)
class ReferenceOrder(StreamOrder):
    """The stream described at the top of this file. epoch_lengths: the rows that T is computed from."""

    sources: tuple[Source, ...]
    epoch_lengths: tuple[int, ...]
    seed: int
    shuffle: bool

    @property
    def num_rows(self) -> int:
        """Rows that may be drawn."""
        return sum(source.num_rows for source in self.sources)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each dataset in an epoch, in the reference's floating-point arithmetic."""
        total_weight = sum(source.weight for source in self.sources)
        shares = [source.weight / total_weight for source in self.sources]
        lengths = [n / share for n, share in zip(self.epoch_lengths, shares, strict=True) if share > 0.05]
        if not lengths:
            raise InputError(
                "no dataset of the mixture has more than 5 % of the weight, which release 1.9.1 cannot mix: "
                "change the weights, or drop --reference-order"
            )
        return tuple(int(max(lengths) * share) for share in shares)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `StreamOrder.at`."""
        tags, draws = self.draws(positions)
        result = np.empty_like(positions)
        for tag in np.unique(tags):
            here = tags == tag
            result[here] = self.sources[tag].rows(draws[here] % self.sources[tag].num_rows)
        return result

    def drawn(self, consumed_samples: int) -> tuple[int, ...]:
        """See `Order.drawn`; with `shuffle`, one pass over an epoch's permutation."""
        counts = self.counts
        epoch, place = divmod(consumed_samples, sum(counts))
        if self.shuffle:
            places = _torch_permutation(self.seed + epoch, sum(counts))[:place]
            inside = np.bincount(np.searchsorted(np.cumsum(counts), places, side="right"), minlength=len(counts))
        elif len(counts) == 1:
            inside = np.array([place])
        else:
            tags, drawn_before = _shuffled_tags(counts, self.seed)
            block = min(place // _BLOCK, len(drawn_before) - 1)
            inside = drawn_before[block] + np.bincount(tags[block * _BLOCK : place], minlength=len(counts))
        return tuple(epoch * count + number for count, number in zip(counts, inside.tolist(), strict=True))

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position: its dataset, and which of that dataset's samples in the epoch it is."""
        counts = self.counts
        epochs, places = np.divmod(positions, sum(counts))
        if self.shuffle:
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                places[here] = _torch_permutation(self.seed + epoch, sum(counts))[places[here]]
        if self.shuffle or len(counts) == 1:
            ends = np.cumsum(counts)
            tags = np.searchsorted(ends, places, side="right")
            return tags, places - (ends - counts)[tags]
        shuffled, drawn_before = _shuffled_tags(counts, self.seed)
        tags, draws = np.empty_like(places), np.empty_like(places)
        for block in np.unique(places // _BLOCK).tolist():
            here = places // _BLOCK == block
            in_block = shuffled[block * _BLOCK : (block + 1) * _BLOCK]
            within = places[here] - block * _BLOCK
            numbers = np.empty(len(in_block), dtype=np.int64)
            for tag in np.unique(in_block[within]):
                mine = in_block == tag
                numbers[mine] = drawn_before[block, tag] + np.arange(np.count_nonzero(mine))
            tags[here], draws[here] = in_block[within], numbers[within]
        return tags, draws


@lru_cache(maxsize=2)
def _shuffled_tags(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Each position's dataset (uint16, 2 bytes a sample), and how many of each came before every block (b, k)."""
    tags = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    np.random.default_rng(seed).shuffle(tags)
    blocks = -(-len(tags) // _BLOCK)
    inside = [np.bincount(tags[i * _BLOCK : (i + 1) * _BLOCK], minlength=len(counts)) for i in range(blocks)]
    return tags, np.cumsum([np.zeros(len(counts), dtype=np.int64), *inside[:-1]], axis=0)


@lru_cache(maxsize=2)
def _torch_permutation(seed: int, n: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
