"""One optimizer step over one global batch.

Shape letters: s sequence, b micro-batch. Every rank of a pipeline reads the same rows, so each knows its micro-batches'
loss masks before the forward pass, and with them the number by which every micro-batch's summed loss is divided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor
from torch.profiler import record_function

from megatron.crystalcoder import platform
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.optimizer import place_eps, set_learning_rate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class NonFinite:
    """Where a NaN or infinity was first seen: on this rank, in these of its micro-batches or in this parameter."""

    rank: int
    data_parallel_rank: int
    micro_batches: tuple[int, ...]
    parameter: str | None


@dataclass(frozen=True)
class StepResult:
    """What one step did. `updated` is False when the loss or the gradient norm was not finite: nothing was changed.

    data_wait_s: seconds until the rows of the batch were there.
    """

    lm_loss: float
    grad_norm: float
    updated: bool
    non_finite: tuple[NonFinite, ...] = ()
    data_wait_s: float = 0.0


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    micro_batches: Iterator[Batch],
    config: TrainConfig,
    *,
    lr: float,
) -> StepResult:
    """Take one global batch from `micro_batches` and update the model with learning rate `lr` (of unscaled groups)."""
    asked = time.perf_counter()
    with record_function("data"):
        batches = [next(micro_batches) for _ in range(num_micro_batches(config))]
    data_wait_s = time.perf_counter() - asked
    divisors = loss_divisors(batches, config)

    with record_function("forward and backward"):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(model, batches, divisors, config)
        loss = mean_over_data_parallel(losses)

    with record_function("gradient norm"):
        optimizer.prepare_grads()
        grad_norm = gradient_norm(optimizer)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return StepResult(loss, grad_norm, False, _find_non_finite(model, losses), data_wait_s)

    with record_function("optimizer"):
        set_learning_rate(optimizer, lr)
        place_eps(optimizer, config.optimizer)
        if config.optimizer.clip_grad > 0 and (parameters := optimizer.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, config.optimizer.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
    return StepResult(loss, grad_norm, updated=True, data_wait_s=data_wait_s)


def num_micro_batches(config: TrainConfig) -> int:
    """Micro-batches that each data-parallel rank contributes to one global batch."""
    return config.global_batch_size // (config.micro_batch_size * parallel_state.get_data_parallel_world_size())


def loss_divisors(batches: list[Batch], config: TrainConfig) -> list[float]:
    """What each micro-batch's sum of masked token losses is divided by, such that the MEAN over micro-batches and
    data-parallel ranks (which megatron-core takes of losses and gradients) is the configured reduction.

    token        sum / tokens of the global batch: the same for any micro-batch size and number of ranks
    micro_batch  mean over micro-batches of sum / the micro-batch's tokens; without any token it adds 0
    sequence     sum / sequences of the global batch * loss_weight: masked tokens lower the loss
    """
    tokens = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches])
    if config.loss_reduction == "micro_batch":
        return [max(count, 1.0) for count in tokens.tolist()]
    if config.loss_reduction == "sequence":
        return [config.micro_batch_size / config.loss_weight] * len(batches)
    total = tokens.sum().to(platform.device())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    mean_tokens = float(total) / (len(batches) * parallel_state.get_data_parallel_world_size())
    return [mean_tokens if mean_tokens > 0 else 1.0] * len(batches)


def forward_backward(
    model: DistributedDataParallel,
    batches: list[Batch],
    divisors: list[float],
    config: TrainConfig,
    *,
    forward_only: bool = False,
) -> Tensor:
    """Run megatron-core's pipeline schedule over the micro-batches; gradients land in the model's buffers.

    Returns each micro-batch's divided loss, fp64 of shape (len(batches),), on every stage of the pipeline.
    """
    device = platform.device()
    logged: list[Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(zip(batches, divisors, strict=True)),
        model=[model],
        num_microbatches=len(batches),
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        decoder_seq_length=config.seq_length,
        forward_only=forward_only,
    )
    losses = torch.zeros(len(batches), dtype=torch.float64, device=device)
    if parallel_state.is_pipeline_last_stage():
        losses += torch.stack(logged)
    dist.all_reduce(losses, group=parallel_state.get_pipeline_model_parallel_group())
    return losses


def _forward_step(batches: Iterator[tuple[Batch, float]], model: Any) -> tuple[Tensor, Any]:
    """What the schedule calls per micro-batch: this stage's output, and how the last stage makes a loss of it."""
    batch, divisor = next(batches)
    device = platform.device()
    tokens_bs, labels_bs, position_ids_bs, mask_bs = (
        batch[key].to(device, non_blocking=True) for key in ("tokens", "labels", "position_ids", "loss_mask")
    )

    def masked_loss(losses_bs: Tensor) -> tuple[Tensor, Tensor]:
        loss = (losses_bs.float() * mask_bs).sum() / divisor
        return loss, loss.detach().double()

    documents_bs = batch["documents"].to(device, non_blocking=True) if "documents" in batch else None
    return model(tokens_bs, position_ids_bs, documents_bs, labels=labels_bs), masked_loss


def mean_over_data_parallel(losses: Tensor) -> float:
    """Mean of the micro-batches' losses (n,) over them and over the data-parallel ranks."""
    total = losses.sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total) / (len(losses) * parallel_state.get_data_parallel_world_size())


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """L2 norm of the whole model's gradient, each parameter counted once whatever the layout.

    Summed in fp64: torch's fp32 norm of millions of elements is off by 1e-5 to 1e-4 on a CPU, and clipping follows it.
    """
    total = torch.zeros((), dtype=torch.float64, device=platform.device())
    for gradient in optimizer.get_main_grads_for_grad_norm():
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return float(total.sqrt())


def _find_non_finite(model: DistributedDataParallel, losses: Tensor) -> tuple[NonFinite, ...]:
    """Ask every rank which of its micro-batches, or else which parameter's gradient, is not finite."""
    parameters = (
        name
        for name, p in model.module.named_parameters()
        if p.requires_grad and not bool(torch.isfinite(p.main_grad).all())
    )
    mine = NonFinite(
        rank=dist.get_rank(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        micro_batches=tuple(int(i) for i in (~torch.isfinite(losses)).nonzero().flatten()),
        parameter=next(parameters, None),
    )
    found: list[NonFinite] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    # A bad loss spoils everyone's gradients, so where there is one, it is to blame. All ranks of its model copy saw it.
    to_blame = [each for each in found if each.micro_batches] or [each for each in found if each.parameter]
    return tuple({each.data_parallel_rank: each for each in reversed(to_blame)}.values())
