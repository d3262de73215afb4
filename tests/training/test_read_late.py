"""Losses and norms read while the next step runs: the same run, nothing waits, and nothing that is not finite is saved.

A GPU reads late by default; here a CPU is told to.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.fusions import FUSIONS, Speed
from support.distributed import run_on_ranks
from support.training_runs import column, metrics_of, tiny_config, tiny_weights, write_rows

DP2 = ParallelConfig(use_distributed_optimizer=True)
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
BAD_STEP = 4


def run(data: Path, save: Path | None = None, **changes: Any) -> Any:
    from megatron.crystalcoder.training.loop import train

    return train(tiny_config(data, save, **changes), initial_weights=cast(Any, tiny_weights()))


@contextmanager
def before_each_step(act: Callable[[int, Any], None]) -> Iterator[list[int]]:
    """Call act(number, model) before each step is started; yields the numbers of those that were."""
    from megatron.crystalcoder.training import loop

    started: list[int] = []
    real = loop.start_step

    def start(model: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(len(started) + 1)
        act(started[-1], model)
        return real(model, *args, **kwargs)

    loop.start_step = start
    try:
        yield started
    finally:
        loop.start_step = real


def runs_on_a_rank(data: Path, folder: Path) -> dict[str, Any]:
    from megatron.crystalcoder.training.step_reader import NonFiniteError

    common: dict[str, Any] = {"eval_interval": 4, "eval_iters": 1, "save_interval": 3, "log_params_norm": True}
    for read in ("now", "late"):
        for name, parallel, bf16 in (("dp", DP2, False), ("tp", TP2, True)):
            config = tiny_config(data)
            run(
                data, folder / f"{read} {name}", parallel=parallel, bf16=bf16, read_losses=read,
                eval_data=(config.data,), **common,
            )  # fmt: skip

    found: dict[str, Any] = {}
    # A weight becomes infinite before step 4.
    for case, save_interval in (("now", 3), ("late", 3), ("late due", 2)):

        def spoil(number: int, model: Any) -> None:
            if number == BAD_STEP:
                with torch.no_grad():
                    dict(model.module.named_parameters())["decoder.layers.1.mlp.linear_fc2.bias"].fill_(float("inf"))

        read = case.split()[0]
        with before_each_step(spoil) as started, pytest.raises(NonFiniteError) as caught:
            run(data, folder / f"bad {case}", parallel=DP2, read_losses=read, save_interval=save_interval)
        found[f"bad {case}"] = (str(caught.value), started)

    for read in ("now", "late"):

        def terminate(number: int, model: Any) -> None:
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with before_each_step(terminate):
            found[f"stopped {read}"] = run(data, folder / f"stopped {read}", parallel=TP2, read_losses=read)

    for name, changes in {
        "skip": {"skip_nonfinite": True},
        "plain": {"speed": Speed(frozenset(FUSIONS) - {"adamw"})},
    }.items():
        with pytest.raises(InputError) as refused:
            run(data, folder / "refused", parallel=DP2, read_losses="late", **cast(Any, changes))
        found[name] = str(refused.value)
    found["steps"] = {name: one_step(data, name == "fused") for name in ("fused", "plain")}
    return found


class _Waits(TorchDispatchMode):
    """Counts what would make a host wait for a GPU: numbers of a tensor asked for, sizes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def one_step(data: Path, fused: bool) -> tuple[int, Any]:
    """How often a step waits; and of a second one, which gets NaN gradients, what it says and what it changed."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.data.loader import micro_batches, open_data
    from megatron.crystalcoder.training import step
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start

    speed = Speed() if fused else Speed(frozenset(FUSIONS) - {"adamw"})
    config = tiny_config(data, parallel=DP2, speed=speed)
    platform.initialize_model_parallel(config.parallel)
    rows, order = open_data(config.data, seq_length=config.seq_length, vocab_size=config.model.vocab_size)
    batches = micro_batches(rows, order, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=2)
    model, optimizer = build(config, Start("", cast(Any, tiny_weights())))
    with _Waits() as waits:
        first = step.start_step(model, optimizer, batches, config, lr=1e-3)
    assert first.result().updated

    real = step.forward_backward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        losses = real(*args, **kwargs)
        for each in ("layers.2.mlp.linear_fc1.weight", "layers.3.mlp.linear_fc1.bias"):
            dict(model.module.named_parameters())[f"decoder.{each}"].main_grad.fill_(float("nan"))
        return losses

    before = [parameter.detach().clone() for parameter in model.parameters()]
    step.forward_backward = spoiled
    result = step.train_step(model, optimizer, batches, config, lr=1e-3)
    step.forward_backward = real
    unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    counts = {group.get("step", 0) for group in optimizer.param_groups}
    return len(waits.seen), (result.updated, {each.parameter for each in result.non_finite}, unchanged, counts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("late")
    write_rows(folder / "rows.jsonl")
    return folder, run_on_ranks(2, runs_on_a_rank, folder / "rows.jsonl", folder)[0]


@pytest.mark.parametrize("layout", ["dp", "tp"])
def test_the_same_run(runs: tuple[Path, Any], layout: str) -> None:
    now, late = (runs[0] / f"{read} {layout}" for read in ("now", "late"))
    assert [line["iteration"] for line in metrics_of(late)] == list(range(1, 11))
    for key in ("lm_loss", "grad_norm", "lr", "consumed_samples", "params_norm"):
        np.testing.assert_array_equal(column(late, key), column(now, key), err_msg=key)
    assert (late / "eval.jsonl").read_text() == (now / "eval.jsonl").read_text()
    assert sorted(path.name for path in late.glob("iter_*")) == sorted(path.name for path in now.glob("iter_*"))


def test_what_is_not_finite_ends_the_run_and_is_never_saved(runs: tuple[Path, Any]) -> None:
    """Both ways the message names the step and its rows; the last checkpoint is the one before.

    Planted: nothing read before saving -> the checkpoint of step 4 is there.
    """
    folder, found = runs
    # Late, one step more has been started, but where a checkpoint was due.
    for case, started, saved in (("now", 4, 3), ("late", 5, 3), ("late due", 4, 2)):
        message, numbers = found[f"bad {case}"]
        assert numbers[-1] == started
        assert message.startswith(f"iteration {BAD_STEP}: loss ")
        assert "its loss, from rows [24, 25], [28, 29]" in message
        assert (folder / f"bad {case}/latest_checkpointed_iteration.txt").read_text() == str(saved)
        assert [path.name for path in (folder / f"bad {case}").glob("iter_*")] == [f"iter_000000{saved}"]
        assert [line["iteration"] for line in metrics_of(folder / f"bad {case}")] == [1, 2, 3]


def test_sigterm_is_seen_one_step_later(runs: tuple[Path, Any]) -> None:
    folder, found = runs
    for read, last in (("now", 3), ("late", 4)):
        result = found[f"stopped {read}"]
        assert result.interrupted
        assert result.iteration == last
        assert (folder / f"stopped {read}/latest_checkpointed_iteration.txt").read_text() == str(last)
        assert metrics_of(folder / f"stopped {read}")[-1]["iteration"] == last


def test_refused_where_a_step_must_be_known_of(runs: tuple[Path, Any]) -> None:
    assert "--skip-nonfinite" in runs[1]["skip"]
    assert "adamw" in runs[1]["plain"]
    assert not (runs[0] / "refused").exists()


def test_no_step_waits(runs: tuple[Path, Any]) -> None:
    """No number of a tensor is asked for between a step's first operation and its last; unfused, at least one is."""
    assert runs[1]["steps"]["fused"][0] == 0
    assert runs[1]["steps"]["plain"][0] >= 1


@pytest.mark.parametrize("adam", ["fused", "plain"])
def test_a_gradient_that_is_not_finite_changes_nothing(runs: tuple[Path, Any], adam: str) -> None:
    """The parameter is named that comes first in the model (each rank names the first of its shards).

    Planted: `found_inf` not set -> the weights are NaN.
    """
    updated, named, unchanged, counts = runs[1]["steps"][adam][1]
    assert not updated
    assert unchanged
    assert counts == {1}
    assert named
    assert named <= {"decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.bias"}
