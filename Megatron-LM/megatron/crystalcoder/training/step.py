"""One optimizer step over one global batch.

Shape letters: s sequence, b micro-batch. Every rank of a pipeline reads the same rows, so each knows its micro-batches'
loss masks before the forward pass, and with them the number by which every micro-batch's summed loss is divided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor
from torch.profiler import record_function

from megatron.crystalcoder import platform
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.gradients import gradient_norms, non_finite_parameter, total_norm
from megatron.crystalcoder.training.late import Copied
from megatron.crystalcoder.training.optimizer import take_back, update

Batch = dict[str, Tensor]
Divisors = Sequence[float | Tensor]  # tensors: fp32 () on the device


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


@dataclass(frozen=True)
class StartedStep:
    """A step of which everything has been launched, update included. A GPU may still be at it."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    losses: Tensor  # each micro-batch's, fp64 (m,)
    norms: Tensor  # each gradient's, fp64 (n,)
    told: Copied  # loss, gradient norm
    data_wait_s: float

    def result(self) -> StepResult:
        """Wait for the numbers. To be called once, by all ranks alike."""
        loss, grad_norm = self.told.read()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return StepResult(loss, grad_norm, updated=True, data_wait_s=self.data_wait_s)
        take_back(self.optimizer)
        return StepResult(loss, grad_norm, False, self._find_non_finite(), self.data_wait_s)

    def _find_non_finite(self) -> tuple[NonFinite, ...]:
        """Ask every rank which of its micro-batches, or else which parameter's gradient, is not finite."""
        mine = NonFinite(
            rank=dist.get_rank(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            micro_batches=tuple(int(i) for i in (~torch.isfinite(self.losses)).nonzero().flatten()),
            parameter=non_finite_parameter(self.model, self.optimizer, self.norms),
        )
        found: list[NonFinite] = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        # A bad loss spoils everyone's gradients: where there is one, it is to blame. All ranks of its copy saw it.
        to_blame = [each for each in found if each.micro_batches] or [each for each in found if each.parameter]
        return tuple({each.data_parallel_rank: each for each in reversed(to_blame)}.values())


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    micro_batches: Iterator[Batch],
    config: TrainConfig,
    *,
    lr: float,
) -> StepResult:
    """Take one global batch from `micro_batches` and update the model with learning rate `lr` (of unscaled groups)."""
    return start_step(model, optimizer, micro_batches, config, lr=lr).result()


def start_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    micro_batches: Iterator[Batch],
    config: TrainConfig,
    *,
    lr: float,
) -> StartedStep:
    """`train_step` without waiting for its numbers: on a GPU the host goes on, unless AdamW is not fused."""
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
        norms = gradient_norms(optimizer)
        grad_norm = total_norm(norms, optimizer)
    told = Copied(torch.stack([loss, grad_norm]))

    with record_function("optimizer"):
        update(optimizer, config.optimizer, lr=lr, loss=loss, norm=grad_norm)
    return StartedStep(model, optimizer, losses, norms, told, data_wait_s)


def num_micro_batches(config: TrainConfig) -> int:
    """Micro-batches that each data-parallel rank contributes to one global batch."""
    return config.global_batch_size // (config.micro_batch_size * parallel_state.get_data_parallel_world_size())


def loss_divisors(batches: list[Batch], config: TrainConfig) -> Divisors:
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
    total = platform.to_device(tokens.sum())
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    mean_tokens = total / (len(batches) * parallel_state.get_data_parallel_world_size())
    return [torch.where(mean_tokens > 0, mean_tokens, 1.0).float()] * len(batches)


def forward_backward(
    model: DistributedDataParallel,
    batches: list[Batch],
    divisors: Divisors,
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


def _forward_step(batches: Iterator[tuple[Batch, float | Tensor]], model: Any) -> tuple[Tensor, Any]:
    """What the schedule calls per micro-batch: this stage's output, and how the last stage makes a loss of it."""
    batch, divisor = next(batches)
    tokens_bs, labels_bs, position_ids_bs, mask_bs = (
        platform.to_device(batch[key]) for key in ("tokens", "labels", "position_ids", "loss_mask")
    )

    def masked_loss(losses_bs: Tensor) -> tuple[Tensor, Tensor]:
        loss = (losses_bs.float() * mask_bs).sum() / divisor
        return loss, loss.detach().double()

    documents_bs = platform.to_device(batch["documents"]) if "documents" in batch else None
    return model(tokens_bs, position_ids_bs, documents_bs, labels=labels_bs), masked_loss


def mean_over_data_parallel(losses: Tensor) -> Tensor:
    """Mean of the micro-batches' losses (m,) over them and over the data-parallel ranks; fp64 ()."""
    total = losses.sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total / (len(losses) * parallel_state.get_data_parallel_world_size())
