"""Micro-batches: tensors as the model takes them, the same whatever reads them."""

from __future__ import annotations

import multiprocessing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry
from support.sequence_rows import S, V, as_objects, make_rows, write_h5, write_jsonl


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """50 rows: 20 in JSONL, 30 in HDF5."""
    data = make_rows(50)
    paths = write_jsonl(tmp_path / "a.jsonl", as_objects(data[:20])), write_h5(tmp_path / "b.h5", data[20:])
    return DataSettings(paths=paths, order="shuffled", seed=3)


def batches(settings: DataSettings, steps: int, consumed: int = 0, rank: int = 0, dp: int = 1, workers: int = 0):  # type: ignore[no-untyped-def]
    rows, order = open_data(settings, seq_length=S, vocab_size=V)
    stream = micro_batches(
        rows, order, consumed_samples=consumed, micro_batch_size=4, dp_rank=rank, dp_size=dp, num_workers=workers
    )
    return list(islice(stream, steps))


def test_tensors_are_what_the_model_takes(settings: DataSettings) -> None:
    """Types, shapes and values of a batch, plane by plane. Planted: labels from plane 1, fails."""
    rows, order = open_data(settings, seq_length=S, vocab_size=V)
    [first, second] = batches(settings, 2)
    numbers = order.rows(4, micro_batch_size=4, dp_rank=0, dp_size=1)
    for plane, name in enumerate(("tokens", "loss_mask", "labels")):
        expected = np.stack([rows[i][plane] for i in numbers])
        assert np.array_equal(second[name].numpy(), expected)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in first.items()} == {
        "tokens": (torch.int64, (4, S)),
        "labels": (torch.int64, (4, S)),
        "position_ids": (torch.int64, (4, S)),
        "loss_mask": (torch.float32, (4, S)),
    }
    assert torch.equal(first["position_ids"][3], torch.arange(S))
    assert torch.equal(first["labels"][:, :-1], first["tokens"][:, 1:])


@pytest.mark.parametrize("isolate", [False, True])
def test_every_tensor_can_be_pinned(settings: DataSettings, isolate: bool) -> None:
    """Pinning allocates as many bytes as sizes and strides span, lays the same strides over them and copies. Planted:
    position_ids as one row of memory, expanded over the micro-batch: torch refuses the copy."""
    rows, order = open_data(settings, seq_length=S, vocab_size=V)
    stream = micro_batches(
        rows, order, consumed_samples=0, micro_batch_size=4, dp_rank=0, dp_size=1, isolate_documents=isolate
    )
    for tensor in next(stream).values():
        pinned = torch.empty(0, dtype=tensor.dtype).set_(
            torch.UntypedStorage(tensor.untyped_storage().nbytes()), 0, tensor.size(), tensor.stride()
        )
        assert torch.equal(pinned.copy_(tensor), tensor)


def test_workers_do_not_change_the_stream(settings: DataSettings) -> None:
    """0, 1 and 3 workers over more than an epoch, from amid one. Planted: batches taken as workers finish, fails."""
    expected = batches(settings, 30, consumed=40)
    for workers in (1, 3):
        for one, other in zip(expected, batches(settings, 30, consumed=40, workers=workers), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_share_a_global_batch(settings: DataSettings) -> None:
    """Two ranks of micro-batch 4 read what one rank reads in two micro-batches."""
    alone = torch.cat([batch["tokens"] for batch in batches(settings, 12)])
    ranks = [batches(settings, 6, rank=rank, dp=2) for rank in range(2)]
    together = torch.cat([rank[step]["tokens"] for step in range(6) for rank in ranks])
    assert torch.equal(alone, together)


def test_a_damaged_row_is_one_line_from_workers_too(tmp_path: Path) -> None:
    data = make_rows(9)
    data[2, 0, 5] = V
    path = write_h5(tmp_path / "x.h5", data)
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"^\S*x\.h5 row 2: token_ids holds 50[^\n]*$") as error:
            batches(DataSettings(paths=(path,), order="single"), 2, workers=workers)
        assert error.tb is not None  # whose frames are alive: a process that ends with them must not wait for workers
        assert not multiprocessing.active_children()


def test_orders_are_chosen_by_name(settings: DataSettings, tmp_path: Path) -> None:
    """Each name gives its order; a mixture takes no cyclic order, and the order `mixture` needs a mixture."""
    for name, kind in (("cyclic", "CyclicOrder"), ("single", "SingleOrder"), ("shuffled", "ShuffledOrder")):
        chosen = DataSettings(paths=settings.paths, order=name)  # type: ignore[arg-type]
        assert type(open_data(chosen, seq_length=S, vocab_size=V)[1]).__name__ == kind
    with pytest.raises(InputError, match="needs a mixture"):
        open_data(DataSettings(paths=settings.paths, order="mixture"), seq_length=S, vocab_size=V)
    entry = MixtureEntry(settings.paths[0], 1.0)
    with pytest.raises(InputError, match="not cyclic"):
        open_data(DataSettings(mixture=(entry,), order="cyclic"), seq_length=S, vocab_size=V)
