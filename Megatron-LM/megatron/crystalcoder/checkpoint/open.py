"""Open a checkpoint of any format: find out which it is, check that it is whole, read nothing else yet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import HF_FILES, TRACKER, read_tracker
from megatron.crystalcoder.checkpoint.hf_reader import HFWeights
from megatron.crystalcoder.checkpoint.megatron_args import from_args, mup_is_recorded
from megatron.crystalcoder.checkpoint.torch_dist_reader import COMMON, FORMAT, TorchDistWeights
from megatron.crystalcoder.checkpoint.torch_reader import TorchWeights, load_first_rank, names_in
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.model.config import ModelConfig

Format = Literal["hf", "torch", "torch_dist", "legacy"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened.

    folder: where its weights lie: `path` itself, or the iteration's directory in it.
    mup_recorded: whether `config`'s muP constants and rotary style come from the checkpoint; if not they are neutral
    and must be replaced before use (the reference's converter did not record them).
    is_converted: a converter wrote it, so a run that starts from it begins at iteration 0 with all rows.
    hf_files: a directory with config.json and tokenizer files that belong to the weights, if there is one.
    """

    path: Path
    folder: Path
    format: Format
    config: ModelConfig
    weights: WeightSource
    mup_recorded: bool = True
    is_converted: bool = False
    iteration: int = 0
    args: argparse.Namespace | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    hf_files: Path | None = None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face or Megatron checkpoint directory. Raises InputError, with what to do about it."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory: give the directory of a checkpoint")
    if (path / "config.json").is_file() and not (path / TRACKER).is_file():
        hf = HFWeights(path)
        return Checkpoint(path, path, "hf", hf.config, hf, hf_files=path)
    iteration, folder = read_tracker(path)
    hf_files = path / HF_FILES if (path / HF_FILES / "config.json").is_file() else None
    is_distributed = (folder / FORMAT).is_file()
    content = safe_load.load(folder / COMMON) if is_distributed else load_first_rank(folder)
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise InputError(
            f"{folder}: records no `args`, so the model's sizes are unknown: save it with a trainer that does"
        )
    config = from_args(args, folder)
    tp_size, pp_size = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    weights: WeightSource
    format_: Format
    if is_distributed:
        format_, weights = "torch_dist", TorchDistWeights(folder, config)
    else:
        names = names_in(content["model"])
        format_ = "legacy" if names == "legacy" else "torch"
        weights = TorchWeights(folder, config, names, tp_size, pp_size)
    recorded = mup_is_recorded(args)
    return Checkpoint(
        path=path,
        folder=folder,
        format=format_,
        config=config,
        weights=weights,
        mup_recorded=recorded,
        # The reference's trainer sets use_mup and its converter does not.
        is_converted=getattr(args, "converted", not recorded),
        iteration=iteration,
        args=args,
        tensor_parallel=tp_size,
        pipeline_parallel=pp_size,
        hf_files=hf_files,
    )
