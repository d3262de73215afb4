"""A params.yaml's model at other widths: by muP's rules, or as one would widen it without them.

Both are the file's model at its base width (width x decoder_kernel). From there, with m = base width / width:

|                                   | muP                    | standard ("sp")  |
|-----------------------------------|------------------------|------------------|
| std of hidden and output matrices | * sqrt(m)              | * sqrt(m)        |
| lr of hidden matrices             | * m                    | as at the base   |
| logits                            | * m                    | as at the base   |
| embedding, biases, norms          | as at the base         | as at the base   |

Heads keep their size and grow in number; the ffn size grows with the width. (Yang et al. 2022, "Tensor Programs V",
table 8, with its standard parametrisation's output weights tied to the embedding.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.data.order import Order
from megatron.crystalcoder.data.rows import Rows
from megatron.crystalcoder.model.initialization import InitSettings, Normal
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.loop import build
from megatron.crystalcoder.training.params import Params
from megatron.crystalcoder.training.resume import Start

Parametrisation = Literal["mup", "sp"]
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("mup", "sp")


def at_width(
    params: Params, config: TrainConfig, width: int, parametrisation: Parametrisation
) -> tuple[TrainConfig, InitSettings]:
    """`config` (of `params`) and the initial weights at another width. Raises InputError if heads do not divide it."""
    model, init = config.model, params.init_settings()
    if width % model.head_dim:
        raise InputError(f"width {width} is not a multiple of the head size {model.head_dim}: choose others")
    base = model.hidden_size * model.mup.width_scale
    scale = base / width if parametrisation == "mup" else 1.0
    # From the file's width, where the spread of hidden matrices is given.
    spread = (model.hidden_size / width) ** 0.5
    ffn = 2 * round(model.ffn_hidden_size * width / model.hidden_size / 2)  # even, for TP 2
    wider = replace(
        model,
        hidden_size=width,
        num_attention_heads=width // model.head_dim,
        ffn_hidden_size=ffn,
        mup=replace(model.mup, width_scale=scale),
    )
    return (
        replace(config, model=wider, optimizer=replace(config.optimizer, hidden_lr_scale=scale)),
        replace(init, hidden=_scaled(init.hidden, spread), output=_scaled(init.output, spread)),
    )


def _scaled(normal: Normal, factor: float) -> Normal:
    a, b = (None if bound is None else bound * factor for bound in (normal.a, normal.b))
    return Normal(normal.std * factor, a, b)


@dataclass(frozen=True)
class Trial:
    """A model at one width, ready to be trained, and the stream of its micro-batches."""

    model: Any  # megatron-core's DistributedDataParallel
    optimizer: Any
    batches: Iterator[dict[str, torch.Tensor]]
    config: TrainConfig


def begin(
    params: Params,
    config: TrainConfig,
    width: int,
    parametrisation: Parametrisation,
    data: tuple[Rows, Order],
    *,
    seed: int,
) -> Trial:
    """Build the model at `width` with weights drawn from `seed`. Needs megatron-core's parallel state; one DP rank."""
    wider, init = at_width(params, config, width, parametrisation)
    model, optimizer = build(wider, Start("", RandomWeights(wider.model, init, seed)))
    batches = micro_batches(*data, consumed_samples=0, micro_batch_size=config.micro_batch_size, dp_rank=0, dp_size=1)
    return Trial(model, optimizer, batches, wider)


def prepare(config: TrainConfig) -> tuple[Rows, Order]:
    """Join the ranks in this run's layout and open its data. Raises InputError as `open_data`."""
    platform.initialize()
    parallel = config.parallel
    if dist.get_world_size() != parallel.model_parallel_size:
        raise InputError(
            f"{dist.get_world_size()} ranks where TP x PP is {parallel.model_parallel_size}: start as many"
        )
    platform.initialize_model_parallel(parallel, config.seed)
    return open_data(config.data, seq_length=config.seq_length, vocab_size=config.model.vocab_size)


def peak_rate(config: TrainConfig) -> float:
    """The highest learning rate of the schedule."""
    segments = getattr(config.schedule, "segments", ())
    return max(max(segment.initial, segment.end) for segment in segments)
