"""Mean token loss over held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from data_prep.errors import InputError
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.data.order import Order
from megatron.crystalcoder.data.rows import Rows
from megatron.crystalcoder.training.config import DataSettings, TrainConfig
from megatron.crystalcoder.training.step import forward_backward


@dataclass(frozen=True)
class EvaluationSet:
    """One entry of `TrainConfig.eval_data`, opened."""

    name: str
    rows: Rows
    order: Order
    num_batches: int  # micro-batches per data-parallel rank


def open_evaluation_sets(config: TrainConfig, dp_size: int | None = None) -> list[EvaluationSet]:
    """Open and check every entry. Raises InputError for one with fewer rows than all ranks' micro-batches need.

    dp_size: data-parallel ranks; None: those that run now.
    """
    dp_size = dp_size or parallel_state.get_data_parallel_world_size()
    names = evaluation_names(config.eval_data)
    return [_open(config, settings, name, dp_size) for settings, name in zip(config.eval_data, names, strict=True)]


def evaluation_names(entries: Sequence[DataSettings]) -> list[str]:
    """A name for each entry: its directory's or file's, the whole path where two are called the same."""
    paths = [entry.paths or tuple(item.data_dir for item in entry.mixture) for entry in entries]
    short = [" + ".join(dict.fromkeys(path.name for path in each)) for each in paths]
    long = [" + ".join(dict.fromkeys(map(str, each))) for each in paths]
    names = [whole if short.count(name) > 1 else name for name, whole in zip(short, long, strict=True)]
    return [f"{name} #{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def _open(config: TrainConfig, settings: DataSettings, name: str, dp_size: int) -> EvaluationSet:
    rows, order = open_data(settings, seq_length=config.seq_length, vocab_size=config.model.vocab_size)
    paths = settings.paths or tuple(entry.data_dir for entry in settings.mixture)
    batch = config.micro_batch_size * dp_size
    available = order.num_rows // batch
    if not available:
        raise InputError(
            f"{paths[0]}: {order.num_rows} evaluation rows, fewer than micro-batch x data-parallel ranks = {batch}: "
            "give more rows or take a smaller micro-batch"
        )
    wanted = config.eval_iters * config.global_batch_size // batch if config.eval_iters else available
    return EvaluationSet(name, rows, order, min(wanted, available))


@torch.no_grad()
def evaluate(model: DistributedDataParallel, sets: list[EvaluationSet], config: TrainConfig) -> dict[str, float]:
    """Loss per trained token of each set, the same rows each time: the first of its order."""
    model.eval()
    losses = {each.name: _mean_token_loss(model, each, config) for each in sets}
    model.train()
    return losses


def _mean_token_loss(model: DistributedDataParallel, each: EvaluationSet, config: TrainConfig) -> float:
    batches = micro_batches(
        each.rows,
        each.order,
        consumed_samples=0,
        micro_batch_size=config.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        isolate_documents=config.data.isolate_documents,
    )
    total = torch.zeros(2, dtype=torch.float64)  # loss summed over tokens, tokens
    for _ in range(each.num_batches):
        batch = next(batches)
        # The schedule divides by the number of micro-batches it is given: one at a time, so by 1.
        total[0] += forward_backward(model, [batch], [1.0], config, forward_only=True).sum().cpu()
        total[1] += batch["loss_mask"].sum()
    total = total.to(next(model.parameters()).device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    loss, tokens = total.tolist()
    return loss / tokens if tokens else math.nan
