"""Lay out Megatron's `torch` format: one file per model-parallel rank, whole but for the tensors' values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.layout import Layout
from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.tensor_files import save_torch
from megatron.crystalcoder.checkpoint.torch_reader import Names, row_name
from megatron.crystalcoder.checkpoint.weights import DTypes, Row, chunk_rows, megatron_dtype, megatron_shape
from megatron.crystalcoder.model.config import ModelConfig


def lay_out_torch(
    iteration_dir: Path,
    config: ModelConfig,
    dtypes: DTypes,
    args: argparse.Namespace,
    iteration: int,
    layout: Layout,
    dialect: Names,
) -> None:
    """Fill `iteration_dir` with mp_rank_TT[_PPP]/model_optim_rng.pt, values zero and checksums still to come."""
    for pp_rank in range(layout.pipeline_parallel):
        content: dict[str, Any] = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
        for virtual_rank, chunk in enumerate(layout.chunks(pp_rank)):
            rows = chunk_rows(config, layout, chunk)
            key = "model" if layout.virtual == 1 else f"model{virtual_rank}"
            model = {row: _empty(row, config, dtypes, layout.tensor_parallel) for row in rows}
            named = {row_name(row, dialect): tensor for row, tensor in model.items()}
            content[key] = _nested(named) if dialect == "legacy" else named
        for tp_rank in range(layout.tensor_parallel):
            file = rank_file(iteration_dir, tp_rank, pp_rank, layout.pipeline_parallel)
            file.parent.mkdir(parents=True)
            save_torch(content, file, with_values=False)


def _empty(row: Row, config: ModelConfig, dtypes: DTypes, tp_size: int) -> torch.Tensor:
    """Takes no memory: nobody writes to it."""
    return torch.empty(megatron_shape(row, config, tp_size), dtype=megatron_dtype(row, dtypes))


def _nested(flat: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The reference's nesting: its encoder is a flat dictionary inside, everything else a tree."""
    nested: dict[str, Any] = {"language_model": {"encoder": {}}}
    for name, tensor in flat.items():
        encoder = "language_model.encoder."
        path = (
            ["language_model", "encoder", name.removeprefix(encoder)] if name.startswith(encoder) else name.split(".")
        )
        place = nested
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = tensor
    return nested
