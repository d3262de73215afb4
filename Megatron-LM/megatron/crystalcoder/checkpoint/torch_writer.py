"""Write Megatron's `torch` format tensor by tensor: one file per model-parallel rank, none ever held in memory."""

from __future__ import annotations

import argparse
import mmap
from pathlib import Path

import torch
from torch import Tensor

from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.weights import (
    WeightSource,
    megatron_dtype,
    megatron_shape,
    shard,
    stage_rows,
    to_full,
)
from megatron.crystalcoder.model.config import ModelConfig


def write_torch(
    iteration_dir: Path,
    source: WeightSource,
    config: ModelConfig,
    args: argparse.Namespace,
    iteration: int,
    tp_size: int,
    pp_size: int,
) -> None:
    """Fill `iteration_dir` with mp_rank_TT[_PPP]/model_optim_rng.pt, reading every tensor of the source once.

    Each file is first saved without its data, then filled in place through a shared mapping. (torch.load does not mind
    that the zip's checksums are those of the empty file; `unzip -t` would.)
    """
    config.check_layout(tp_size, pp_size)
    for pp_rank in range(pp_size):
        files = [rank_file(iteration_dir, tp_rank, pp_rank, pp_size) for tp_rank in range(tp_size)]
        rows = stage_rows(config, pp_rank, pp_size)
        # torch.empty takes no memory until it is written to.
        model = {
            row.mcore: torch.empty(megatron_shape(row, config, tp_size), dtype=megatron_dtype(row, source))
            for row in rows
        }
        content = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration, "model": model}
        for file in files:
            file.parent.mkdir(parents=True)
            with torch.serialization.skip_data():
                torch.save(content, file)
        for row in rows:
            full = to_full(row, [source.read(name) for name in row.hf], config)
            for tp_rank, file in enumerate(files):
                _fill(file, row.mcore, shard(row, full, tp_rank, tp_size))


def _fill(file: Path, name: str, tensor: Tensor) -> None:
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        safe_load.load(file)["model"][name].copy_(tensor)
