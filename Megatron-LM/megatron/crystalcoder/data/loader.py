"""From settings to rows in an order, and on to micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.errors import InputError
from megatron.crystalcoder.data.isolation import documents_and_positions
from megatron.crystalcoder.data.mixture import open_mixture
from megatron.crystalcoder.data.order import Order, make_order
from megatron.crystalcoder.data.reference_order import open_reference
from megatron.crystalcoder.data.rows import Rows, open_rows
from megatron.crystalcoder.sigterm import helpers_outlive_sigterm
from megatron.crystalcoder.training.config import DataSettings


def open_data(settings: DataSettings, *, seq_length: int, vocab_size: int) -> tuple[Rows, Order]:
    """Open and validate the data of `settings`; raises InputError as `open_rows`, `open_mixture` and
    `open_reference` do.
    """
    if settings.reference_order:
        return open_reference(settings, seq_length=seq_length, vocab_size=vocab_size)
    if settings.mixture:
        return open_mixture(settings, seq_length=seq_length, vocab_size=vocab_size)
    if settings.order == "mixture":
        raise InputError("the order 'mixture' needs a mixture of datasets: choose cyclic, single or shuffled")
    rows = open_rows(settings.paths, seq_length=seq_length, vocab_size=vocab_size)
    return rows, make_order(settings.order, len(rows), seed=settings.seed, data_sharding=settings.data_sharding)


def micro_batches(
    rows: Rows,
    order: Order,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    isolate_documents: bool = False,
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This data-parallel rank's micro-batches without end, from where `consumed_samples` samples were consumed.

    Yields CPU tensors (b, s): int64 `tokens`, `labels` and `position_ids` (0 to s-1: not reset at document ends) and
    float32 `loss_mask`. With `isolate_documents` also int64 `documents`, the number of each token's document in its
    row, and positions start again at 0 in each (isolation.py). `num_workers` processes read ahead; the batches are the
    same for any number of them.
    """
    numbers = (
        order.rows(consumed, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        for consumed in count(consumed_samples, micro_batch_size * dp_size)
    )
    collate = _collate_isolated if isolate_documents else _collate
    if not num_workers:
        return (collate(rows.batch(batch.tolist())) for batch in numbers)
    return _read_ahead(rows, numbers, num_workers, collate)


def _read_ahead(
    rows: Rows,
    numbers: Iterator[np.ndarray],
    num_workers: int,
    collate: Callable[[np.ndarray], dict[str, torch.Tensor]],
) -> Generator[dict[str, torch.Tensor], None, None]:
    batches = (batch.tolist() for batch in numbers)
    loader = DataLoader(
        _BatchDataset(rows, collate),
        sampler=batches,  # any iterable; each item is a whole micro-batch, and this one has no end
        batch_size=None,
        num_workers=num_workers,
    )
    with helpers_outlive_sigterm():
        workers: Any = iter(loader)
    try:
        yield from workers
    except InputError as error:
        # The loader wraps a worker's error in the worker's traceback; the one line is its end.
        raise InputError(str(error).rsplit("InputError: ", 1)[-1].strip()) from None
    finally:
        # Not left to its destructor: an error's traceback keeps the loader until the process ends, which then would
        # send its workers the SIGTERM that they do not get, and wait for them.
        workers._shutdown_workers()


class _BatchDataset(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, rows: Rows, collate: Callable[[np.ndarray], dict[str, torch.Tensor]]) -> None:
        self._rows, self._collate = rows, collate

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self._collate(self._rows.batch(indices))


def _collate(planes: np.ndarray) -> dict[str, torch.Tensor]:
    """The planes (b, 3, s) as the model takes them. numpy converts: torch would wake every thread for it."""
    # Every tensor dense: torch refuses to pin one whose elements share memory, as those of an expanded one do.
    positions = np.tile(np.arange(planes.shape[2], dtype=np.int64), (len(planes), 1))
    return {
        "tokens": torch.from_numpy(planes[:, 0].astype(np.int64)),
        "labels": torch.from_numpy(planes[:, 2].astype(np.int64)),
        "position_ids": torch.from_numpy(positions),
        "loss_mask": torch.from_numpy(planes[:, 1].astype(np.float32)),
    }


def _collate_isolated(planes: np.ndarray) -> dict[str, torch.Tensor]:
    tensors = _collate(planes)
    tensors["documents"], tensors["position_ids"] = documents_and_positions(tensors["tokens"], tensors["labels"])
    return tensors
