"""Moments in bf16 and 8bit: how exactly they are kept, that runs learn as with fp32, and that none is lost on the way.

Planted once each and caught: rounding to the nearest, v instead of its root, a seed that differs between ranks, a
checkpoint saved without unpacking, the last piece of a parameter left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.platform import GroupStepAdamW
from megatron.crystalcoder.training import compact_adam
from megatron.crystalcoder.training.compact_adam import CompactAdamW
from megatron.crystalcoder.training.config import OptimizerSettings
from megatron.crystalcoder.training.moments import BLOCK, pack, packed_zeros, unpack
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.text_runs import curve, text_rows
from support.training_runs import column, tiny_config, tiny_weights, write_rows

KINDS = pytest.mark.parametrize("kind", ["bf16", "8bit"])
# Half of a format's spacing, relative: the most that a number is off is twice that, rounded the wrong way.
HALF_SPACING = {"bf16": 2**-8, "8bit": 2**-4}


def seed(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32)


@KINDS
@pytest.mark.parametrize("count", [1, 255, 1000])
def test_packing(kind: Any, count: int) -> None:
    """Sizes over many powers of ten, no multiple of a block."""
    values = torch.randn(count) * torch.logspace(-6, 2, count)
    packed = pack(values, kind, seed(3))
    kept = unpack(packed)
    assert (packed.numbers.element_size(), packed.exponents.numel()) == {
        "bf16": (2, 0),
        "8bit": (1, -(-count // BLOCK)),
    }[kind]
    # Below 1/16,000 of its block's largest number, 8bit is exact to 2^-9 of its smallest power of two only.
    largest = torch.nn.functional.pad(values.abs(), (0, -count % BLOCK)).view(-1, BLOCK).amax(1)
    floor = largest.repeat_interleave(BLOCK)[:count] * 2.0**-15 if kind == "8bit" else torch.zeros(count)
    assert ((kept - values).abs() <= torch.maximum(2 * HALF_SPACING[kind] * values.abs(), floor)).all()
    again = pack(kept, kind, seed(4))
    assert torch.equal(unpack(again), kept)
    assert torch.equal(unpack(pack(values, kind, seed(3))), kept)
    assert not unpack(packed_zeros(count, kind, torch.device("cpu"))).any()
    assert not unpack(pack(torch.zeros(count), kind, seed(9))).any()


@KINDS
def test_rounding_is_right_on_average(kind: Any) -> None:
    values = torch.rand(300) + 0.5
    mean = sum(unpack(pack(values, kind, seed(7919 * i))).double() for i in range(2000)) / 2000
    assert (mean / values - 1).abs().max() < 6 * HALF_SPACING[kind] / 2000**0.5
    assert (mean / values - 1).mean().abs() < HALF_SPACING[kind] / 2000**0.5


@KINDS
def test_a_value_that_is_not_finite_stays_so(kind: Any) -> None:
    kept = unpack(pack(torch.tensor([1.0, float("nan"), float("inf")]), kind, seed(1)))
    assert not torch.isfinite(kept[1:]).any()


@KINDS
def test_updates_follow_those_of_fp32(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of noisy gradients that span three powers of ten within a block, in pieces; the weights go where fp32's
    go, but for noise that averages out."""
    monkeypatch.setattr(compact_adam, "PIECE", 2 * BLOCK)
    start, mean, size = torch.randn(40, 33), torch.randn(40, 33), 10.0 ** (-3 * torch.rand(40, 33))
    settings: Any = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    weights, sizes = [], []
    for compact in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        kept: Any = {"kind": kind, "compiled": False}
        optimizer: Any = (
            CompactAdamW([parameter], **settings, **kept) if compact else GroupStepAdamW([parameter], **settings)
        )
        generator = torch.Generator().manual_seed(5)
        for _ in range(100):
            parameter.grad = size * (mean + 3 * torch.randn(40, 33, generator=generator))
            optimizer.step()
        weights.append(parameter.detach())
        sizes.append(len(getattr(optimizer, "packed", {}).get(parameter, [])))
    assert sizes == [0, 3]
    moved = (weights[0] - start).norm()
    assert 0 < (weights[1] - weights[0]).norm() < {"bf16": 0.01, "8bit": 0.09}[kind] * moved


def settings(kind: str) -> OptimizerSettings:
    return OptimizerSettings(
        clip_grad=1.0, weight_decay=0.1, hidden_lr_scale=TINY.mup.width_scale, states=cast(Any, kind)
    )


def run(rows: Path, save: Path, kind: str, parallel: ParallelConfig, steps: int, bf16: bool, form: str) -> None:
    """On this rank, go on to iteration `steps`."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import train

    platform.initialize()
    config = tiny_config(rows, save, optimizer=settings(kind), parallel=parallel, bf16=bf16, train_iters=steps)
    train(replace(config, save_format=cast(Any, form)), initial_weights=cast(Any, tiny_weights()))


def run_parts(rows: Path, folder: Path, kind: str, parallel: ParallelConfig, bf16: bool, form: str) -> None:
    """8 steps at once, and 4 and 4 with a checkpoint between."""
    for save, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        run(rows, folder / save, kind, parallel, steps, bf16, form)


def check_parts(folder: Path) -> None:
    np.testing.assert_array_equal(column(folder / "parts", "lm_loss"), column(folder / "whole", "lm_loss"))
    np.testing.assert_array_equal(column(folder / "parts", "grad_norm"), column(folder / "whole", "grad_norm"))


@KINDS
@pytest.mark.parametrize(("bf16", "form"), [(False, "torch_dist"), (True, "torch")])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, kind: str, bf16: bool, form: str) -> None:
    """To the bit, and its losses are those of a run with fp32 moments. Going on with fp32 from there works, too."""
    from megatron.crystalcoder import platform

    write_rows(tmp_path / "rows.jsonl")
    one = ParallelConfig()
    run_parts(tmp_path / "rows.jsonl", tmp_path, kind, one, bf16, form)
    run(tmp_path / "rows.jsonl", tmp_path / "fp32", "fp32", one, 8, bf16, form)
    run(tmp_path / "rows.jsonl", tmp_path / "parts", "fp32", one, 10, bf16, form)
    platform.shutdown()
    fp32, whole = column(tmp_path / "fp32", "lm_loss"), column(tmp_path / "whole", "lm_loss")
    np.testing.assert_allclose(whole, fp32, atol={"bf16": 5e-3, "8bit": 0.05}[kind])
    assert np.abs(whole - fp32).max() > 0
    assert len(column(tmp_path / "parts", "lm_loss")) == 10
    np.testing.assert_array_equal(column(tmp_path / "parts", "lm_loss")[:8], whole)


@pytest.mark.slow
def test_loss_over_200_steps_on_real_text(tmp_path: Path, repo_root: Path) -> None:
    """Ends where fp32's does, give or take what another order of the rows does."""
    path = text_rows(tmp_path / "text.h5", repo_root)
    ends = {
        kind: curve(path, tmp_path / kind, 200, optimizer=settings(kind))[-50:].mean()
        for kind in ("fp32", "bf16", "8bit")
    }
    assert abs(ends["bf16"] - ends["fp32"]) < 0.01
    assert abs(ends["8bit"] - ends["fp32"]) < 0.02


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(use_distributed_optimizer=True),
        pytest.param(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(pipeline_model_parallel_size=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(), marks=pytest.mark.slow),
    ],
    ids=["distributed", "TP 2", "PP 2", "DP 2"],
)
def test_resuming_over_ranks(tmp_path: Path, parallel: ParallelConfig) -> None:
    write_rows(tmp_path / "rows.jsonl")
    run_on_ranks(2, run_parts, tmp_path / "rows.jsonl", tmp_path, "8bit", parallel, True, "torch_dist")
    check_parts(tmp_path)


def main_parameters(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """This rank's weights and biases in fp32 after 3 steps in 8bit, both copies of the embedding by one name."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import train_step

    platform.initialize_model_parallel(parallel)
    config = tiny_config(Path(), optimizer=settings("8bit"), parallel=parallel)
    model, optimizer = build(config, Start("test", cast(Any, tiny_weights())))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() if parallel.model_parallel_size == 1 else 0)
    for _ in range(3):
        ids = torch.randint(0, 256, (4, 2, 33), generator=generator)
        batches = [
            {
                "tokens": each[:, :-1],
                "labels": each[:, 1:],
                "position_ids": torch.arange(32).expand(2, 32),
                "loss_mask": torch.ones(2, 32),
            }
            for each in ids
        ]
        train_step(model, optimizer, iter(batches), config, lr=1e-2)
    named = ((name.replace("output_layer", "embedding.word_embeddings"), p) for name, p in model.named_parameters())
    return {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize(
    ("parallel", "shared"),
    [
        (ParallelConfig(), ""),  # data parallelism: everything
        (ParallelConfig(tensor_model_parallel_size=2), "layernorm"),
        (ParallelConfig(pipeline_model_parallel_size=2), "word_embeddings"),
    ],
    ids=["DP 2", "TP 2", "PP 2"],
)
def test_copies_on_several_ranks_stay_the_same(parallel: ParallelConfig, shared: str) -> None:
    one, two = run_on_ranks(2, main_parameters, parallel)
    names = [name for name in one if shared in name and name in two]
    assert names
    assert all(torch.equal(one[name], two[name]) for name in names)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer as mcore_optimizer

    from megatron.crystalcoder.training import loop, optimizer

    parallel = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(InputError, match="--optimizer-states 8bit rounds by chance"):
        loop.check_sizes(tiny_config(Path(), optimizer=settings("8bit"), parallel=parallel))
    loop.check_sizes(tiny_config(Path(), parallel=parallel))
    monkeypatch.setattr(mcore_optimizer, "Adam", torch.optim.AdamW)
    with (
        pytest.raises(InputError, match="--optimizer-states bf16 is for this project's own Adam"),
        optimizer._moments_kept_as("bf16"),
    ):
        pass
