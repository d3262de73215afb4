"""Open a checkpoint of any format: find out which it is, check that it is whole, read nothing else yet."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.adapter import ADAPTER
from megatron.crystalcoder.checkpoint.directory import HF_FILES, TRACKER, read_tracker
from megatron.crystalcoder.checkpoint.hf_reader import open_hf
from megatron.crystalcoder.checkpoint.layout import Layout, layout_of
from megatron.crystalcoder.checkpoint.megatron_args import from_args, mup_is_recorded
from megatron.crystalcoder.checkpoint.placement import BlockWeights
from megatron.crystalcoder.checkpoint.tensor_files import describe_torch
from megatron.crystalcoder.checkpoint.torch_dist_reader import COMMON, FORMAT, open_torch_dist
from megatron.crystalcoder.checkpoint.torch_reader import describe_first_rank, names_in, open_torch
from megatron.crystalcoder.model.config import ModelConfig

Format = Literal["hf", "torch", "torch_dist", "legacy"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, opened.

    folder: where its weights lie: `path` itself, or the iteration's directory in it.
    mup_recorded: whether `config`'s muP constants and rotary style come from the checkpoint; if not they are neutral
    and must be replaced before use (the reference's converter did not record them).
    is_converted: a converter wrote it, so a run that starts from it begins at iteration 0 with all rows.
    is_remote: its weights are fetched when they are wanted; `path` is where they will lie.
    adapter: the folder of a LoRA adapter that belongs to `weights` and is not in them, if a run trained one.
    hf_files: a directory with config.json and tokenizer files that belong to the weights, if there is one.
    """

    path: Path
    folder: Path
    format: Format
    config: ModelConfig
    weights: BlockWeights
    mup_recorded: bool = True
    is_converted: bool = False
    iteration: int = 0
    args: argparse.Namespace | None = None
    layout: Layout | None = None
    hf_files: Path | None = None
    adapter: Path | None = None
    is_remote: bool = False

    @property
    def tensor_parallel(self) -> int:
        """The size it was written at; 1 for Hugging Face."""
        return self.layout.tensor_parallel if self.layout else 1

    @property
    def pipeline_parallel(self) -> int:
        """The size it was written at; 1 for Hugging Face."""
        return self.layout.pipeline_parallel if self.layout else 1


def open_checkpoint(
    path: Path | str, *, true_vocab_size: int | None = None, iteration: int | None = None
) -> Checkpoint:
    """Open a Hugging Face or Megatron checkpoint directory. Raises InputError, with what to do about it.

    true_vocab_size: the rows of the vocabulary that count, where another writer padded it and does not say so.
    iteration: of a Megatron directory that holds several; None: the one that its tracker names.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory: give the directory of a checkpoint")
    if (path / "config.json").is_file() and not (path / TRACKER).is_file():
        hf = open_hf(path)
        if iteration is not None:
            raise InputError(f"{path}: a Hugging Face checkpoint has no iterations: drop --iteration")
        if true_vocab_size not in (None, hf.config.vocab_size):
            raise InputError(
                f"{path}: the vocabulary has {hf.config.vocab_size} rows, not the {true_vocab_size} of "
                "--true-vocab-size (a Hugging Face checkpoint's is never padded): drop the flag"
            )
        return Checkpoint(path, path, "hf", hf.config, hf, hf_files=path)
    iteration, folder = read_tracker(path, iteration)
    hf_files = path / HF_FILES if (path / HF_FILES / "config.json").is_file() else None
    is_distributed = (folder / FORMAT).is_file()
    content = describe_torch(folder / COMMON) if is_distributed else describe_first_rank(folder)
    args = content.get("args") if isinstance(content, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise InputError(
            f"{folder}: records no `args`, so the model's sizes are unknown: save it with a trainer that does"
        )
    config = from_args(args, folder)
    if true_vocab_size is not None:
        if true_vocab_size > config.vocab_size:
            raise InputError(
                f"{path}: the vocabulary has {config.vocab_size} rows, fewer than the {true_vocab_size} of "
                "--true-vocab-size: correct the flag"
            )
        config = replace(config, unpadded_vocab_size=true_vocab_size if true_vocab_size < config.vocab_size else None)
    layout = layout_of(args, config, folder)
    format_: Format
    if lora := getattr(args, "lora", None):
        base = _base_of(folder, Path(lora["base"]))
        format_, weights, hf_files = "torch_dist", base.weights, base.hf_files
    elif is_distributed:
        format_, weights = "torch_dist", open_torch_dist(folder, config)
    else:
        names = names_in(content)
        format_ = "legacy" if names == "legacy" else "torch"
        weights = open_torch(folder, config, names, layout)
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
        layout=layout,
        hf_files=hf_files,
        adapter=folder / ADAPTER if lora else None,
    )


def _base_of(folder: Path, path: Path) -> Checkpoint:
    """What the adapter in `folder` was trained on."""
    if not path.is_dir():
        raise InputError(f"{folder}: holds an adapter of the weights at {path}, which are not there: put them back")
    base = open_checkpoint(path)
    if base.adapter is not None:
        raise InputError(f"{path}: holds an adapter itself: export it (crystalcoder finetune export) and adapt that")
    return base
