"""The whole training step against a plain fp64 loop: formulas for the model, autograd, AdamW written out.

The loop knows no ranks, so agreement at every layout also shows that losses and updates do not depend on the layout,
nor (by token and by sequence) on the micro-batch size. Seen at TP2/PP2: loss within 2e-7, gradient norm within 9e-8
relative. Planted once each at TP2/PP2, worst loss difference: mask shifted by one 0.035; the gradients of the embedding
and of the head's copy not summed (an untied head) 0.072; lr scaled on the head's copy 0.066; weight decay on linear
biases 1.2e-5 (gradient norm 4.7e-5 relative); at DP4, eps after the correction where it is asked for before: 6.9e-4.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import OptimizerSettings, TrainConfig
from megatron.crystalcoder.training.schedules import learning_rate
from support.distributed import run_on_ranks
from support.reference_model import TINY, reference_logits
from support.training_runs import GLOBAL_BATCH, SEQ, column, metrics_of, tiny_config, tiny_weights, write_rows

DP4 = ParallelConfig(use_distributed_optimizer=True)
TP2_DP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, overlap_grad_reduce=True)
PP2_DP2 = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)

# eps as large as the roots it is added to.
BEFORE_CORRECTION = OptimizerSettings(hidden_lr_scale=TINY.mup.width_scale, adam_eps=1e-3, eps_before_correction=True)

# name -> (layout, what differs from the tiny configuration)
CASES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "token, DP4 with the distributed optimizer": (DP4, {"micro_batch_size": 1}),
    "token, DP4": (ParallelConfig(), {"micro_batch_size": 1}),
    "token, TP2 SP DP2, overlapped": (TP2_DP2, {"micro_batch_size": 4}),
    "token, PP2 DP2, distributed optimizer": (PP2_DP2, {}),
    "token, TP2 PP2 SP": (TP2_PP2, {"micro_batch_size": 1}),
    "micro_batch, TP2 PP2 SP": (TP2_PP2, {"loss_reduction": "micro_batch"}),
    "micro_batch, DP4": (ParallelConfig(), {"loss_reduction": "micro_batch"}),
    "sequence, PP2 DP2": (PP2_DP2, {"loss_reduction": "sequence", "loss_weight": 1 / SEQ, "micro_batch_size": 4}),
    "token, DP4, eps before correction": (DP4, {"micro_batch_size": 1, "optimizer": BEFORE_CORRECTION}),
}


def plain_loop(rows: np.ndarray, config: TrainConfig) -> tuple[list[float], list[float], list[float]]:
    """Loss and gradient norm of each step, and the token loss of all rows after every fifth, in fp64."""
    weights = {name: x.double().requires_grad_() for name, x in tiny_weights()._weights.items()}
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in weights.items()}
    losses, norms, evaluations = [], [], []
    for step in range(config.train_iters):
        start = step * GLOBAL_BATCH
        batch = torch.from_numpy(rows[np.arange(start, start + GLOBAL_BATCH) % len(rows)]).long()
        loss = reduced_loss(weights, batch, config)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
        losses.append(float(loss))
        norms.append(float(norm))
        lr = learning_rate(config.schedule, step=step, samples=start)
        adamw(weights, gradients, moments, float(norm), lr, step + 1, config)
        if (step + 1) % 5 == 0:
            with torch.no_grad():
                everything = torch.from_numpy(rows).long()
                evaluations.append(float(reduced_loss(weights, everything, replace(config, loss_reduction="token"))))
    return losses, norms, evaluations


def reduced_loss(weights: dict[str, Tensor], batch: Tensor, config: TrainConfig) -> Tensor:
    tokens, mask, labels = batch.unbind(1)
    logits = reference_logits(weights, TINY, tokens)
    ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    if config.loss_reduction == "token":
        return ce.sum() / mask.sum()
    if config.loss_reduction == "sequence":
        return ce.sum() / GLOBAL_BATCH * config.loss_weight
    micro = zip(ce.split(config.micro_batch_size), mask.split(config.micro_batch_size), strict=True)
    return torch.stack([c.sum() / m.sum().clamp(min=1) for c, m in micro]).mean()


@torch.no_grad()
def adamw(
    weights: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    norm: float,
    lr: float,
    t: int,
    config: TrainConfig,
) -> None:
    settings = config.optimizer
    clip = min(1.0, settings.clip_grad / (norm + 1e-6))
    b1, b2 = settings.adam_beta1, settings.adam_beta2
    for name, p in weights.items():
        m, v = moments[name]
        m.mul_(b1).add_(gradients[name] * clip, alpha=1 - b1)
        v.mul_(b2).add_((gradients[name] * clip).square(), alpha=1 - b2)
        hidden = ".attn." in name or ".mlp." in name
        group_lr = lr * (settings.hidden_lr_scale if hidden else 1.0)
        decay = settings.weight_decay if p.dim() == 2 else 0.0
        if settings.eps_before_correction:  # as the reference writes it
            update = m / (v.sqrt() + settings.adam_eps) * (1 - b2**t) ** 0.5 / (1 - b1**t)
        else:
            update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings.adam_eps)
        p -= group_lr * (update + decay * p)


def train_all(data: Path, folder: Path) -> None:
    from megatron.crystalcoder.training.loop import train

    for number, (parallel, changes) in enumerate(CASES.values()):
        config = tiny_config(data, folder / str(number), parallel=parallel, **changes)
        evaluated = replace(config, eval_data=(config.data,), eval_interval=5)
        train(evaluated, initial_weights=cast(Any, tiny_weights()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("plain")
    rows = write_rows(folder / "rows.jsonl")
    run_on_ranks(4, train_all, folder / "rows.jsonl", folder)
    return folder, rows


@pytest.mark.parametrize("case", CASES)
def test_against_fp64_loop(runs: tuple[Path, np.ndarray], case: str) -> None:
    folder, rows = runs
    save = folder / str(list(CASES).index(case))
    parallel, changes = CASES[case]
    config = tiny_config(folder / "rows.jsonl", parallel=parallel, **changes)
    losses, norms, evaluations = plain_loop(rows, config)
    np.testing.assert_allclose(column(save, "lm_loss"), losses, atol=2e-6, rtol=0)
    np.testing.assert_allclose(column(save, "grad_norm"), norms, rtol=2e-6)
    np.testing.assert_array_equal(column(save, "lr_hidden"), column(save, "lr") * TINY.mup.width_scale)
    evaluated = [json.loads(line) for line in (save / "eval.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in evaluated] == [5, 10]
    np.testing.assert_allclose([line["losses"]["rows.jsonl"] for line in evaluated], evaluations, rtol=2e-6)
    last = metrics_of(save)[-1]
    assert (last["iteration"], last["consumed_samples"], last["consumed_tokens"]) == (10, 80, 80 * SEQ)
    assert 0 < last["data_wait_s"] < last["elapsed_s"]
    assert last["mfu"] is None or 0 < last["mfu"] < 1


def test_distributed_optimizer_changes_nothing(runs: tuple[Path, np.ndarray]) -> None:
    folder, _ = runs
    names = list(CASES)
    with_it, without = (
        folder / str(names.index(name)) for name in ("token, DP4 with the distributed optimizer", "token, DP4")
    )
    for key in ("lm_loss", "grad_norm"):
        np.testing.assert_allclose(column(with_it, key), column(without, key), rtol=1e-6)
