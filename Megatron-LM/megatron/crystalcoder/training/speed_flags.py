"""The flags that say how fast and in how much memory a run computes what it computes; the same at both front doors."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, get_args

from megatron.crystalcoder.model.fusions import FUSIONS, Compile, Speed, parse_fusions
from megatron.crystalcoder.training.config import TrainConfig


def add_speed_arguments(group: Any) -> None:
    """Add them to a parser or one of its groups."""
    group.add_argument(
        "--fusions",
        default="all",
        metavar="NAMES",
        help="what runs fused: all (default), none, or names separated by commas, -NAME leaving one out; "
        + "; ".join(f"{name}: {what}" for name, what in FUSIONS.items()),
    )
    group.add_argument(
        "--compile",
        choices=get_args(Compile),
        default="auto",
        help="torch.compile for the fused passes one by one (ops), or not (off); auto (default): ops on a GPU",
    )
    group.add_argument(
        "--loss-chunk", type=int, default=0, metavar="TOKENS", help="tokens whose fp32 logits exist at a time; 0: auto"
    )
    group.add_argument(
        "--peak-tflops",
        type=_positive,
        metavar="TFLOPS",
        help="what one rank's device can do at most, dense: MFU is told against it. Default: the bf16 peak of GPUs "
        "known by name; on others and on a CPU no MFU is told",
    )


def with_speed_flags(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """`config` as the parsed flags want it. Raises InputError for an unknown fusion."""
    return replace(
        config,
        speed=Speed(parse_fusions(options.fusions), options.compile, options.loss_chunk),
        peak_tflops=options.peak_tflops,
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
