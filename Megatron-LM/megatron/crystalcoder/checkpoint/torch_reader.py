"""Read Megatron's `torch` format, one file per model-parallel rank, with megatron-core's names or the reference's."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.layout import Layout
from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.placement import BlockWeights, Placement, shard_regions
from megatron.crystalcoder.checkpoint.tensor_files import TensorRef, describe_torch
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import TIED_HEAD, Row, chunk_rows, megatron_shape
from megatron.crystalcoder.model.config import ModelConfig

# megatron-core's, of plain layers or of such that fuse the norms into linears; the reference's.
Names = Literal["mcore", "fused", "legacy"]


def describe_first_rank(iteration_dir: Path) -> dict[str, Any]:
    """Rank 0's file, described: it tells the layout (`args`) and, by its names, the dialect."""
    found = [path for pp_size in (1, 2) if (path := rank_file(iteration_dir, 0, 0, pp_size)).is_file()]
    if not found:
        raise InputError(f"{rank_file(iteration_dir, 0, 0, 1)}: no such file: the checkpoint is incomplete")
    content = describe_torch(found[0])
    has_model = isinstance(content, dict) and isinstance(content.get(model_key(0, content)), dict)
    if not has_model or "args" not in content:
        raise InputError(f"{found[0]}: has no `args` and `model`: this is not a checkpoint of Megatron's")
    version = content.get("checkpoint_version", 0)
    if not 2 <= version <= CHECKPOINT_VERSION:
        raise InputError(
            f"{found[0]}: checkpoint_version {version} orders the rows of qkv differently: "
            "load and save it once with a Megatron-LM that writes 3.0"
        )
    return content


def model_key(virtual_rank: int, content: dict[str, Any]) -> str:
    """Where a rank's file holds a chunk's weights: `model`, or `model0`, `model1` in a virtual pipeline."""
    return "model" if "model" in content else f"model{virtual_rank}"


def names_in(content: dict[str, Any]) -> Names:
    """Which dialect a rank's file speaks: the reference's weights are nested, megatron-core's are flat."""
    model = content.get(model_key(0, content))
    is_legacy = isinstance(model, dict) and ("language_model" in model or "word_embeddings_for_head" in model)
    return "legacy" if is_legacy else "mcore"


def row_name(row: Row, dialect: Names, found: Container[str] = ()) -> str:
    """A row's name in a rank's file, dots for nesting; layers that fuse norms (`found` tells) name those otherwise."""
    if dialect == "fused" or row.norm_fused in found:
        return row.sharded_name
    return row.mcore if dialect == "mcore" else row.legacy


def open_torch(iteration_dir: Path, config: ModelConfig, dialect: Names, layout: Layout) -> BlockWeights:
    """Every rank's names and shapes checked against the table, and where the tensors lie. Reads headers only."""
    placement = Placement(config, iteration_dir)
    tp_size, pp_size = layout.tensor_parallel, layout.pipeline_parallel
    for pp_rank in range(pp_size):
        for tp_rank in range(tp_size):
            path = rank_file(iteration_dir, tp_rank, pp_rank, pp_size)
            content = describe_torch(path)
            if not isinstance(content, dict) or names_in(content) != dialect:
                raise InputError(f"{path}: does not hold the same kind of `model` as rank 0's file")
            for virtual_rank, chunk in enumerate(layout.chunks(pp_rank)):
                model = content.get(model_key(virtual_rank, content))
                if not isinstance(model, dict):
                    raise InputError(f"{path}: does not hold the same kind of `model` as rank 0's file")
                found, rows = _flatten(model), chunk_rows(config, layout, chunk)
                check_shapes(
                    {name: ref.shape for name, ref in found.items()},
                    {row_name(row, dialect, found): megatron_shape(row, config, tp_size) for row in rows},
                    path,
                )
                for row in rows:
                    ref = found[row_name(row, dialect, found)]
                    is_replica = row.split is None and tp_rank > 0
                    copy = (row.mcore == TIED_HEAD.mcore, tp_rank if row.split is None else None)
                    regions = shard_regions(row, config, ref, tp_rank, tp_size)
                    placement.add(row, ref, regions, copy, is_replica=is_replica)
    return placement.weights(
        f"{iteration_dir}: the embedding on the first pipeline stage and its copy on the last one differ: "
        "one of the files is from another checkpoint"
    )


def _flatten(model: dict[str, Any], prefix: str = "") -> dict[str, TensorRef]:
    """Nested dictionaries to dotted names; what is not a tensor (Transformer Engine's extra state) is left out."""
    flat: dict[str, TensorRef] = {}
    for name, value in model.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, TensorRef) and not str(name).endswith("_extra_state"):
            flat[prefix + name] = value
    return flat
