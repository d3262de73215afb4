"""The flags that say how fast and in how much memory a run computes what it computes; the same at both front doors."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from megatron.crystalcoder.model.fusions import FUSIONS, Compile, Speed, parse_fusions


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


def speed_settings(options: argparse.Namespace) -> Speed:
    """What the parsed flags say. Raises InputError for an unknown fusion."""
    return Speed(parse_fusions(options.fusions), options.compile, options.loss_chunk)
