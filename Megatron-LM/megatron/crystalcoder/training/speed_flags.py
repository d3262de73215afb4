"""The flags that say how fast and in how much memory a run computes what it computes; the same at both front doors."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import FUSIONS, Compile, Fp8, Speed, parse_fusions
from megatron.crystalcoder.training.config import ProfileSettings, TrainConfig
from megatron.crystalcoder.training.memory import OptimizerStates


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
        "--fp8",
        choices=get_args(Fp8),
        default="off",
        help="products of the blocks' linear layers in 8-bit floating point (on), or the same numbers, slowly, where "
        "there are no such products (emulated); default: off",
    )
    group.add_argument(
        "--ffn-multiple-of",
        type=int,
        default=0,
        metavar="N",
        help="pad each tensor-parallel rank's FFN with zeros, which stay zero, to a multiple of N: 128 suits GPUs, "
        "whose products are slow on the 7B model's 10,922; default: 0, as it is",
    )
    group.add_argument(
        "--optimizer-states",
        choices=get_args(OptimizerStates),
        default="fp32",
        help="what Adam's moments are kept in between the steps: 8, 4 or 2 bytes a parameter; default: fp32",
    )
    group.add_argument(
        "--offload-activations",
        action="store_true",
        help="keep what the layers save for their backward pass in the host's memory; with full recomputation that is "
        "each layer's input, for long sequences",
    )
    group.add_argument(
        "--loss-chunk", type=int, default=0, metavar="TOKENS", help="tokens whose fp32 logits exist at a time; 0: auto"
    )
    group.add_argument(
        "--overlap-grad-reduce",
        action="store_true",
        help="reduce gradients over data-parallel ranks during the backward pass",
    )
    group.add_argument(
        "--overlap-param-gather",
        action="store_true",
        help="with the distributed optimizer: gather its updated weights during the next forward pass",
    )
    group.add_argument(
        "--read-losses",
        choices=("auto", "now", "late"),
        default="auto",
        help="each step's loss and norm when it ends (now), or while the next one runs (late), so that a GPU never "
        "waits for the host; auto (default): late on a GPU, but not with --skip-nonfinite",
    )
    group.add_argument(
        "--profile", metavar="STEPS", help="write a torch profiler trace of these steps: 10:12, both included, or one"
    )
    group.add_argument("--profile-dir", type=Path, metavar="DIR", help="where; default: profile beside the checkpoints")
    group.add_argument("--profile-ranks", metavar="RANKS", help="0 (default), 0,8 or all")
    group.add_argument(
        "--peak-tflops",
        type=_positive,
        metavar="TFLOPS",
        help="what one rank's device can do at most, dense: MFU is told against it. Default: the bf16 peak of GPUs "
        "known by name; on others and on a CPU no MFU is told",
    )


def with_speed_flags(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """`config` as the parsed flags want it. Raises InputError for an unknown fusion, a profile of no steps, or settings
    that do not go together."""
    profile_dir = options.profile_dir or (config.save / "profile" if config.save else None)
    if not options.profile and (options.profile_dir or options.profile_ranks):
        raise InputError("--profile-dir and --profile-ranks need --profile: add it, or drop them")
    return replace(
        config,
        model=_padded(config, options.ffn_multiple_of),
        optimizer=replace(config.optimizer, states=options.optimizer_states),
        speed=Speed(
            parse_fusions(options.fusions),
            options.compile,
            options.loss_chunk,
            options.fp8,
            options.offload_activations,
        ),
        parallel=_overlapped(config.parallel, options),
        read_losses=options.read_losses,
        profile=_profile(options.profile, profile_dir, options.profile_ranks or "0") if options.profile else None,
        peak_tflops=options.peak_tflops,
    )


def _overlapped(parallel: ParallelConfig, options: argparse.Namespace) -> ParallelConfig:
    gathers = options.overlap_param_gather
    if gathers and not (parallel.use_distributed_optimizer and options.overlap_grad_reduce):
        raise InputError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce: add them, or drop it"
        )
    return replace(parallel, overlap_grad_reduce=options.overlap_grad_reduce, overlap_param_gather=gathers)


def _padded(config: TrainConfig, multiple: int) -> ModelConfig:
    model = config.model
    if multiple < 0:
        raise InputError(f"--ffn-multiple-of {multiple}: must be at least 1, or 0 for no padding")
    if not multiple:
        return model
    if config.lora is not None:
        raise InputError("--ffn-multiple-of does not go with --lora-rank: an adapter has its base's sizes; drop it")
    return model.with_ffn_multiple_of(multiple * config.parallel.tensor_model_parallel_size)


def _profile(steps: str, folder: Path | None, ranks: str) -> ProfileSettings:
    """`10:12` or `10` (both ends belong to it), where the traces go, and `0`, `0,8` or `all`. Raises InputError."""
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
        raise InputError(f"--profile {steps}: give the first and the last step, as in 10:12, or one step")
    chosen = None
    if ranks != "all":
        words = ranks.split(",")
        if not all(word.isdecimal() for word in words):
            raise InputError(f"--profile-ranks {ranks}: give ranks separated by commas, or all")
        chosen = frozenset(map(int, words))
    if folder is None:
        raise InputError("--profile needs a place for its traces: give --profile-dir")
    return ProfileSettings(int(first), int(last or first), folder, chosen)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
