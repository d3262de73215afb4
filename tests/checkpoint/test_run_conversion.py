"""A run's checkpoint at another layout: training goes on from it; and training keeps padding zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Files, Scratch, Stored, pieces, read_piece
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.checkpoint.torch_dist_reader import open_optimizer
from megatron.crystalcoder.model.config import ParallelConfig
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.training_runs import column, tiny_config, tiny_weights, write_rows

TP2 = ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True)
PADDED = TINY.padded(TINY.vocab_size, 180)


def _train(rows: Path, save: Path, **changes: Any) -> None:
    from megatron.crystalcoder.training.loop import train

    train(tiny_config(rows, save, **changes), initial_weights=cast(Any, tiny_weights()))


def _runs(folder: Path) -> None:
    """Ten steps at once, five of the same, and ten of the padded model."""
    rows = folder / "rows.jsonl"
    _train(rows, folder / "whole", parallel=TP2)
    _train(rows, folder / "half", parallel=TP2, train_iters=5)
    _train(rows, folder / "padded", parallel=TP2, model=PADDED)


def _go_on(folder: Path) -> None:
    _train(folder / "rows.jsonl", folder / "other", parallel=PP2)


def _padding_values(stored: Stored) -> np.ndarray:
    """The stored values that pad a tensor, as they are on disk."""
    with Files() as files:
        parts = [
            read_piece(files, piece, Scratch(), stored.dtype.itemsize).ravel()
            for block in stored.padding
            for piece in pieces(block, block.rows, stored.dtype.itemsize)
        ]
    return np.concatenate(parts) if parts else np.empty(0)


def test_training_goes_on_at_another_layout(tmp_path: Path) -> None:
    """From TP2 to PP2 after five of ten steps: the same losses as in one go."""
    write_rows(tmp_path / "rows.jsonl")
    run_on_ranks(2, _runs, tmp_path)
    whole = column(tmp_path / "whole", "lm_loss")
    half = open_checkpoint(tmp_path / "half")

    convert(tmp_path / "half", tmp_path / "other", format="torch_dist", tensor_parallel=1, pipeline_parallel=2)
    other = open_checkpoint(tmp_path / "other")
    assert (other.iteration, other.is_converted, other.pipeline_parallel) == (5, False, 2)
    before, after = (open_optimizer(x.folder, x.config) for x in (half, other))
    assert sorted(before) == sorted(after) == [f"optimizer.state.{x}." for x in ("exp_avg", "exp_avg_sq", "param")]
    for kind, state in before.items():
        for name in state.names():
            assert torch.equal(state.read(name), after[kind].read(name)), (kind, name)
    run_on_ranks(2, _go_on, tmp_path)
    assert np.abs(column(tmp_path / "other", "lm_loss") - whole[5:]).max() < 2e-5

    # The padded model is the same model, and its padding is zero at the end: Adam with weight decay left weights and
    # moments there alone. What is not zero would be refused.
    padded = open_checkpoint(tmp_path / "padded")
    sets = {"": padded.weights, **open_optimizer(padded.folder, padded.config)}
    assert len(sets) == 4
    for prefix, weights in sets.items():
        sizes = [_padding_values(stored) for stored in weights.stored.values()]
        # Gate and linear branch with their biases, and the output matrix: 8 rows each, in 4 layers.
        assert [values.size for values in sizes if values.size] == [8 * 64, 8 * 64, 8, 8, 8 * 64] * 4, prefix
        assert not any(values.any() for values in sizes), prefix
    convert(tmp_path / "padded", tmp_path / "trimmed", format="torch_dist", tensor_parallel=1)
    trimmed = open_checkpoint(tmp_path / "trimmed")
    assert (trimmed.config, trimmed.iteration) == (TINY, 10)
    assert len(open_optimizer(trimmed.folder, trimmed.config)) == 3
    assert np.abs(column(tmp_path / "padded", "lm_loss") - whole).max() < 2e-5
    convert(tmp_path / "padded", tmp_path / "hf", format="hf")
    convert(tmp_path / "whole", tmp_path / "hf_whole", format="hf")
    one, two = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "hf_whole")
    assert one.config == two.config == TINY
    for name in one.weights.names():
        # The loss does not depend on the keys' bias: its gradient is rounding, which Adam makes as large as any other.
        keys = slice(TINY.hidden_size, 2 * TINY.hidden_size) if name.endswith("c_attn.bias") else slice(0, 0)
        difference = (one.weights.read(name) - two.weights.read(name)).abs()
        difference[keys] = 0
        assert difference.max() < 1e-4, name

    convert(tmp_path / "half", tmp_path / "released", format="torch_dist", release=True)
    released = open_checkpoint(tmp_path / "released")
    assert released.folder.name == "release"
    assert not open_optimizer(released.folder, released.config)
    with pytest.raises(InputError, match="--dtype casts weights and not optimizer state: add --release"):
        convert(tmp_path / "half", tmp_path / "no", format="torch_dist", dtype=torch.bfloat16)
