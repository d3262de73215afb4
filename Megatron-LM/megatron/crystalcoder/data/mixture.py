"""Several datasets in fixed proportions, as one endless stream of samples that can be entered anywhere.

An epoch draws n_i samples of dataset i (`epoch_counts`). It is cut into blocks; each block's share of every dataset is
its exact proportion rounded so that the shares of the blocks so far never stray by more than one sample, and the order
within a block is a seeded permutation. So any stretch of the stream has the asked proportions, and which dataset
position k belongs to, and how many of it came before, is arithmetic over one block.

The j-th draw of a dataset is its row j modulo its length (or a permutation of them per pass): draws go on where the
last epoch left off, so a dataset that an epoch sees only partly is seen whole in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from data_prep.errors import InputError
from data_prep.subset import format_subset, subset_ranges
from megatron.crystalcoder.data.order import Order, StreamOrder, shuffled_cycle
from megatron.crystalcoder.data.permutation import permute
from megatron.crystalcoder.data.rows import Rows, open_rows
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry

# Datasets with no more than this share do not lengthen the epoch (the reference's rule): they are repeated instead.
_COUNTING_SHARE = Fraction(1, 20)
_SMALLEST_BLOCK = 1024


def open_mixture(settings: DataSettings, *, seq_length: int, vocab_size: int) -> tuple[Rows, Order]:
    """Open every dataset of `settings.mixture` with a weight above 0, their rows one after the other, and mix them.

    `settings.order` says how rows follow each other within a dataset: "single" or "mixture" in the files' order,
    "shuffled" in a fresh permutation per pass. Raises InputError: as `open_rows`; a negative weight; none above 0; an
    empty subset; the cyclic order.
    """
    if settings.order == "cyclic":
        raise InputError("a mixture has an order of its own: choose single or shuffled, not cyclic")
    check_weights(settings.mixture)
    entries = [entry for entry in settings.mixture if entry.weight > 0]
    parts = [open_rows([entry.data_dir], seq_length=seq_length, vocab_size=vocab_size) for entry in entries]
    sources, start = [], 0
    for entry, part in zip(entries, parts, strict=True):
        ranges = subset_ranges(entry.subset, len(part))
        if not ranges:
            raise InputError(
                f"{entry.data_dir}: data_subset {format_subset(entry.subset)} of {len(part)} rows holds none: widen it"
            )
        sources.append(Source(entry.weight, tuple((start + first, start + end) for first, end in ranges)))
        start += len(part)
    rows = Rows([file for part in parts for file in part.files])
    return rows, MixtureOrder(tuple(sources), settings.seed, shuffle=settings.order == "shuffled")


def check_weights(mixture: Sequence[MixtureEntry]) -> None:
    """Raise InputError unless all weights are numbers of 0 or more, and one is above 0."""
    for entry in mixture:
        if not 0 <= entry.weight < float("inf"):
            raise InputError(
                f"{entry.data_dir}: mixture weight {entry.weight} is not a number of 0 or more: correct it"
            )
    if not any(entry.weight for entry in mixture):
        raise InputError("no dataset of the mixture has a weight above 0: give at least one a positive weight")


def epoch_counts(weights: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """Samples that an epoch draws of each dataset, from positive weights (normalised here) and the rows they have.

    The epoch is as long as it takes to see the slowest dataset once, among those with more than 5 % of the weight (all,
    if none has): T = max length / weight; dataset i gives int(T * weight_i), at least one. The rule of the reference.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counting = [share > _COUNTING_SHARE for share in shares]
    if not any(counting):
        counting = [True] * len(shares)
    total = max(length / share for length, share, counts in zip(lengths, shares, counting, strict=True) if counts)
    return [max(1, int(total * share)) for share in shares]


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture: its weight, and the row ranges [first, end) it may draw from."""

    weight: float
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """Rows in all ranges."""
        return sum(end - first for first, end in self.ranges)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Row numbers of this dataset's rows `numbers`, counted through its ranges; both int64 (k,)."""
        sizes = [end - first for first, end in self.ranges]
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, numbers, side="right")
        firsts = np.array([first for first, _ in self.ranges])
        return firsts[which] + numbers - (ends - sizes)[which]


@dataclass(frozen=True)
class MixtureOrder(StreamOrder):
    """The stream described at the top of this file. `seed` orders the blocks, and the passes where `shuffle` is set."""

    sources: tuple[Source, ...]
    seed: int
    shuffle: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of all datasets that may be drawn."""
        return sum(source.num_rows for source in self.sources)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each dataset in an epoch."""
        return _plan(self).counts

    def at(self, positions: np.ndarray) -> np.ndarray:
        """See `StreamOrder.at`."""
        tags, draws = self.draws(positions)
        result = np.empty_like(positions)
        for tag in np.unique(tags):
            here = tags == tag
            source = self.sources[tag]
            if self.shuffle:
                numbers = shuffled_cycle(draws[here], source.num_rows, self.seed, int(tag))
            else:
                numbers = draws[here] % source.num_rows
            result[here] = source.rows(numbers)
        return result

    def drawn(self, consumed_samples: int) -> tuple[int, ...]:
        """See `Order.drawn`: whole epochs, whole blocks, and a count within one block."""
        plan = _plan(self)
        epoch, place = divmod(consumed_samples, plan.length)
        block, within = divmod(place, plan.block)
        before = _drawn(plan.counts, block * plan.block)
        tags, _ = _block(self, epoch, block)
        inside = np.bincount(tags[:within], minlength=len(plan.counts)).tolist()
        return tuple(epoch * count + b + i for count, b, i in zip(plan.counts, before, inside, strict=True))

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position: which dataset it belongs to, and how many samples of that dataset came before it."""
        plan = _plan(self)
        epochs, places = positions // plan.length, positions % plan.length
        blocks, within = places // plan.block, places % plan.block
        tags, draws = np.empty_like(positions), np.empty_like(positions)
        for epoch, block in np.unique(np.stack([epochs, blocks]), axis=1).T.tolist():
            here = (epochs == epoch) & (blocks == block)
            block_tags, block_draws = _block(self, epoch, block)
            tags[here], draws[here] = block_tags[within[here]], block_draws[within[here]]
        return tags, draws


@dataclass(frozen=True)
class _Plan:
    counts: tuple[int, ...]
    length: int  # samples in an epoch
    block: int  # positions in a block


@lru_cache(maxsize=64)
def _plan(order: MixtureOrder) -> _Plan:
    counts = epoch_counts([source.weight for source in order.sources], [source.num_rows for source in order.sources])
    length = sum(counts)
    # Large enough to hold a sample of every dataset: then no block's rounded share can be negative (see `_drawn`).
    return _Plan(tuple(counts), length, min(length, max(_SMALLEST_BLOCK, -(-length // min(counts)))))


def _drawn(counts: Sequence[int], place: int) -> list[int]:
    """Samples of each dataset among the first `place` of an epoch; they add up to `place` and grow with it.

    Differences of rounded-down cumulative shares: each dataset is off its exact share by less than one sample. From
    place p to q dataset i grows by more than counts[i] * (q - p) / length - 2, an integer: not negative when q - p is
    length / counts[i] or more; nor up to the epoch's end, where the shares are exact.
    """
    length = sum(counts)
    ends = [end * place // length for end in accumulate(counts)]
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


@lru_cache(maxsize=16)
def _block(order: MixtureOrder, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Dataset and draw number of every position of one block, both int64 (block,)."""
    plan = _plan(order)
    start, end = block * plan.block, min((block + 1) * plan.block, plan.length)
    before, after = _drawn(plan.counts, start), _drawn(plan.counts, end)
    sorted_tags = np.repeat(np.arange(len(plan.counts)), np.subtract(after, before))
    tags = sorted_tags[permute(np.arange(end - start), end - start, order.seed, epoch, block)]
    draws = np.empty(end - start, dtype=np.int64)
    for tag, (count, first) in enumerate(zip(plan.counts, before, strict=True)):
        here = tags == tag
        draws[here] = epoch * count + first + np.arange(np.count_nonzero(here))
    return tags, draws
