"""Read megatron-core's `torch_dist` format without megatron-core, a process group or a model.

The format is torch.distributed.checkpoint's: every tensor is stored as chunks at offsets of the full tensor, whatever
the layout of ranks that wrote it. megatron-core stacks the layers of a tensor along a new first dimension.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import MegatronWeights, Row, megatron_shape, stage_rows
from megatron.crystalcoder.model.config import ModelConfig

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_LAYERS = "decoder.layers."
# Training saves them beside the weights.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")


def stacked(name: str) -> tuple[str, int | None]:
    """Key and index along the first dimension: decoder.layers.3.mlp.x lies at [3] of decoder.layers.mlp.x."""
    if not name.startswith(_LAYERS):
        return name, None
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


class TorchDistWeights(MegatronWeights):
    """Logical tensors of a `torch_dist` checkpoint, one at a time, whatever TP and PP it was written at."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        super().__init__(config)
        self._path = path
        self._reader = _SafeReader(path)
        self._stored = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS)
        }
        # A model whose layers differ is stored layer by layer; both ways are read.
        self._is_stacked = f"{_LAYERS}0.mlp.linear_fc1.weight" not in self._stored
        expected: dict[str, tuple[int, ...]] = {}
        for row in stage_rows(config):
            key, layer = self._locate(row)
            shape = megatron_shape(row, config)
            expected[key] = shape if layer is None else (config.num_layers, *shape)
        check_shapes({key: tuple(entry.size) for key, entry in self._stored.items()}, expected, path)

    def read_full(self, row: Row, pp_rank: int) -> Tensor:
        key, layer = self._locate(row)
        entry = self._stored[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        # A hole in the chunks must not pass for values.
        tensor = torch.full(sizes, float("nan"), dtype=entry.properties.dtype)
        planner = _ChunkPlanner(key, entry, chunk)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's note that there is no process group: that is the point
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # torch wraps whatever a damaged file raises
            raise InputError(
                f"{self._path}: {key} cannot be read, a .distcp file is missing or damaged: copy it again"
            ) from error
        return tensor if layer is None else tensor[0]

    def full_dtype(self, row: Row, pp_rank: int) -> torch.dtype:
        return self._stored[self._locate(row)[0]].properties.dtype

    def _locate(self, row: Row) -> tuple[str, int | None]:
        for name in (row.sharded_name, row.mcore):
            key, layer = stacked(name) if self._is_stacked else (name, None)
            if key in self._stored:
                return key, layer
        return key, layer


class _ChunkPlanner(DefaultLoadPlanner):
    """Read one chunk of one stored tensor into a tensor of the chunk's size."""

    def __init__(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> None:
        super().__init__()
        self._key, self._entry, self._chunk = key, entry, chunk

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self._key, self._entry, [self._chunk]))

    def lookup_tensor(self, index: Any) -> Tensor:
        return self.state_dict[self._key]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self.state_dict[self._key]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


class _SafeReader(dcp.FileSystemReader):
    """torch's reader, but its metadata is unpickled once, and builds nothing but metadata."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None
        self._metadata_file = path / METADATA

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            try:
                with self._metadata_file.open("rb") as stream:
                    metadata = _MetadataUnpickler(stream, self._metadata_file).load()
            except (OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{self._metadata_file}: cannot be read: copy the checkpoint again") from error
            if not isinstance(metadata, Metadata):
                raise InputError(f"{self._metadata_file}: holds no checkpoint metadata")
            self._metadata = metadata
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Only the classes that describe a checkpoint: an unpickler that takes any class runs any code."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("collections", "OrderedDict"),
        }
    )

    def __init__(self, stream: IO[bytes], where: Path) -> None:
        super().__init__(stream)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or module in self._MODULES or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise InputError(f"{self._where}: refused to unpickle class {module}.{name}: not part of checkpoint metadata")
