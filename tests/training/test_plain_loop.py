"""The whole training step against a plain fp64 loop: formulas for the model, autograd, AdamW written out.

The loop knows no ranks, so agreement at every layout also shows that losses and updates do not depend on the layout, nor
(by token and by sequence) on the micro-batch size. 10 steps agree to 2e-6 in the loss and 1e-6 relative in the gradient
norm. Planted once each, what the worst loss was off by: mask shifted by one {MASK}; the head's copy on the last stage left
out of the embedding's gradient sum {UNTIED}; weight decay on biases {WD}; lr scaled on the head's copy too {COPY}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.schedules import learning_rate
from support.distributed import run_on_ranks
from support.reference_model import TINY, reference_logits
from support.training_runs import GLOBAL_BATCH, SEQ, column, metrics_of, tiny_config, tiny_weights, write_rows

DP4 = ParallelConfig(use_distributed_optimizer=True)
TP2_DP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, overlap_grad_reduce=True)
PP2_DP2 = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)

# name -> (layout, what differs from the tiny configuration)
CASES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "token, DP4 with the distributed optimizer": (DP4, {"micro_batch_size": 1}),
    "token, TP2 SP DP2, overlapped": (TP2_DP2, {"micro_batch_size": 4}),
    "token, PP2 DP2, distributed optimizer": (PP2_DP2, {}),
    "token, TP2 PP2 SP": (TP2_PP2, {"micro_batch_size": 1}),
    "micro_batch, TP2 PP2 SP": (TP2_PP2, {"loss_reduction": "micro_batch"}),
    "micro_batch, DP4": (ParallelConfig(), {"loss_reduction": "micro_batch"}),
    "sequence, PP2 DP2": (PP2_DP2, {"loss_reduction": "sequence", "loss_weight": 1 / SEQ, "micro_batch_size": 4}),
}


def plain_loop(rows: np.ndarray, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each step, in fp64."""
    weights = {name: x.double().requires_grad_() for name, x in tiny_weights()._weights.items()}
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in weights.items()}
    losses, norms = [], []
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
    return losses, norms


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
        update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + settings.adam_eps)
        p -= group_lr * (update + decay * p)


def train_all(data: Path, folder: Path) -> None:
    from megatron.crystalcoder.training.loop import train

    for number, (parallel, changes) in enumerate(CASES.values()):
        train(
            tiny_config(data, folder / str(number), parallel=parallel, **changes),
            initial_weights=cast(Any, tiny_weights()),
        )


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
    losses, norms = plain_loop(rows, config)
    np.testing.assert_allclose(column(save, "lm_loss"), losses, atol=2e-6 * max(1.0, losses[0]), rtol=0)
    np.testing.assert_allclose(column(save, "grad_norm"), norms, rtol=2e-5)
    np.testing.assert_array_equal(column(save, "lr_hidden"), column(save, "lr") * TINY.mup.width_scale)
    last = metrics_of(save)[-1]
    assert (last["iteration"], last["consumed_samples"], last["consumed_tokens"]) == (10, 80, 80 * SEQ)
    assert last["mfu"] is None or 0 < last["mfu"] < 1
