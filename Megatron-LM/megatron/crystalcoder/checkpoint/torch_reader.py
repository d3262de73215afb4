"""Read Megatron's `torch` format, one file per model-parallel rank, with megatron-core's names or the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import (
    EMBEDDING,
    TIED_HEAD,
    MegatronWeights,
    Row,
    megatron_shape,
    stage_rows,
    unshard,
)
from megatron.crystalcoder.model.config import ModelConfig

Names = Literal["mcore", "legacy"]


def load_first_rank(iteration_dir: Path) -> dict[str, Any]:
    """Rank 0's file, mapped: it tells the layout (`args`) and, by its names, the dialect."""
    found = [path for pp_size in (1, 2) if (path := rank_file(iteration_dir, 0, 0, pp_size)).is_file()]
    if not found:
        raise InputError(f"{rank_file(iteration_dir, 0, 0, 1)}: no such file: the checkpoint is incomplete")
    content = safe_load.load(found[0])
    if not isinstance(content, dict) or "args" not in content or not isinstance(content.get("model"), dict):
        raise InputError(f"{found[0]}: has no `args` and `model`: this is not a checkpoint of Megatron's")
    version = content.get("checkpoint_version", 0)
    if not 2 <= version <= CHECKPOINT_VERSION:
        raise InputError(
            f"{found[0]}: checkpoint_version {version} orders the rows of qkv differently: "
            "load and save it once with a Megatron-LM that writes 3.0"
        )
    return content


def names_in(model: dict[str, Any]) -> Names:
    """Which dialect a rank's `model` speaks: the reference's is nested, megatron-core's is flat."""
    return "legacy" if "language_model" in model or "word_embeddings_for_head" in model else "mcore"


class TorchWeights(MegatronWeights):
    """Logical tensors assembled from the rank files, one at a time.

    Opening it checks every rank's names and shapes against the table. Each read maps the files it needs and lets them
    go, so that optimizer state beside the weights costs nothing.
    """

    def __init__(self, iteration_dir: Path, config: ModelConfig, names: Names, tp_size: int, pp_size: int) -> None:
        super().__init__(config, pp_size)
        self._dir, self._dialect, self._tp_size, self._pp_size = iteration_dir, names, tp_size, pp_size
        config.check_layout(tp_size, pp_size)
        self._has_head_copy = config.tie_word_embeddings and pp_size > 1
        self._dtypes: dict[tuple[str, int], torch.dtype] = {}
        for pp_rank in range(pp_size):
            rows = stage_rows(config, pp_rank, pp_size)
            expected = {self._name(row): megatron_shape(row, config, tp_size) for row in rows}
            for tp_rank in range(tp_size):
                found = self._load(tp_rank, pp_rank)
                check_shapes(
                    {name: tuple(t.shape) for name, t in found.items()}, expected, self._file(tp_rank, pp_rank)
                )
                self._dtypes.update({(name, pp_rank): tensor.dtype for name, tensor in found.items()})

    def read_full(self, row: Row, pp_rank: int) -> Tensor:
        ranks = range(self._tp_size) if row.split is not None else range(1)
        full = unshard(row, [self._load(tp_rank, pp_rank)[self._name(row)] for tp_rank in ranks])
        if row is EMBEDDING and self._has_head_copy:
            self._check_head_copy(full)
        return full

    def full_dtype(self, row: Row, pp_rank: int) -> torch.dtype:
        return self._dtypes[self._name(row), pp_rank]

    def _check_head_copy(self, embedding: Tensor) -> None:
        if not torch.equal(self.read_full(TIED_HEAD, self._pp_size - 1), embedding):
            raise InputError(
                f"{self._dir}: the embedding on the first pipeline stage and its copy on the last one differ: "
                "one of the files is from another checkpoint"
            )

    def _name(self, row: Row) -> str:
        return row.mcore if self._dialect == "mcore" else row.legacy

    def _file(self, tp_rank: int, pp_rank: int) -> Path:
        return rank_file(self._dir, tp_rank, pp_rank, self._pp_size)

    def _load(self, tp_rank: int, pp_rank: int) -> dict[str, Tensor]:
        path = self._file(tp_rank, pp_rank)
        content = safe_load.load(path)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or names_in(model) != self._dialect:
            raise InputError(f"{path}: does not hold the same kind of `model` as rank 0's file")
        return _flatten(model)


def _flatten(model: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dictionaries to dotted names; what is not a tensor (Transformer Engine's extra state) is left out."""
    flat: dict[str, Tensor] = {}
    for name, value in model.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and not name.endswith("_extra_state"):
            flat[prefix + name] = value
    return flat
