"""Read megatron-core's `torch_dist` format without megatron-core, a process group or a model.

The format is torch.distributed.checkpoint's: every tensor is stored as chunks at offsets of the full tensor, whatever
the layout of ranks that wrote it. megatron-core stacks the layers of a tensor along a new first dimension.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.placement import BlockWeights, Placement, matrix_region
from megatron.crystalcoder.checkpoint.tensor_files import TensorRef, describe_torch
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import Row, megatron_shape, stage_rows
from megatron.crystalcoder.model.config import ModelConfig

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_LAYERS = "decoder.layers."
_OPTIMIZER = "optimizer."
_STATE = "optimizer.state."
# Training saves them beside the weights.
NOT_WEIGHTS = (_OPTIMIZER, "rng_state", "rerun_state_machine_state", "opt_param_scheduler")


def stacked(name: str) -> tuple[str, int | None]:
    """Key and index along the first dimension: decoder.layers.3.mlp.x lies at [3] of decoder.layers.mlp.x."""
    if not name.startswith(_LAYERS):
        return name, None
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


def open_torch_dist(path: Path, config: ModelConfig) -> BlockWeights:
    """The weights of a `torch_dist` checkpoint, whatever TP and PP it was written at. Reads headers only."""
    metadata = read_metadata(path)
    tensors = _tensor_entries(metadata)
    return _open(path, config, metadata, {k: v for k, v in tensors.items() if not k.startswith(NOT_WEIGHTS)}, "")


def open_optimizer(path: Path, config: ModelConfig) -> dict[str, BlockWeights]:
    """The optimizer state beside the weights: for each kind, by its prefix, tensors named and shaped like the weights.

    Kinds are Adam's moments and, in training with bf16 or the distributed optimizer, fp32 weights. Empty where there is
    no state. Raises InputError for state that is not stored parameter by parameter.
    """
    metadata = read_metadata(path)
    kinds: dict[str, dict[str, TensorStorageMetadata]] = {}
    for key, entry in _tensor_entries(metadata).items():
        if key.startswith(_OPTIMIZER):
            kind, _, name = key.removeprefix(_STATE).partition(".")
            if not key.startswith(_STATE) or not name.startswith(("decoder.", "embedding.", "output_layer.")):
                raise InputError(
                    f"{path}: the optimizer state ({key}) is stored by ranks and not by parameters: save it as "
                    "`fully_reshardable`, or leave it behind with --release"
                )
            kinds.setdefault(f"{_STATE}{kind}.", {})[name] = entry
    return {prefix: _open(path, config, metadata, entries, prefix) for prefix, entries in kinds.items()}


def _tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata.items()
    return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _open(
    path: Path, config: ModelConfig, metadata: Metadata, entries: dict[str, TensorStorageMetadata], prefix: str
) -> BlockWeights:
    """One set of tensors, by their names without the prefix under which they are stored."""
    # A model whose layers differ is stored layer by layer; both ways are read.
    is_stacked = f"{_LAYERS}0.mlp.linear_fc1.weight" not in entries
    expected: dict[str, tuple[int, ...]] = {}
    located: list[tuple[Row, str, int | None]] = []
    for row in stage_rows(config):
        for name in (row.sharded_name, row.mcore):
            key, layer = stacked(name) if is_stacked else (name, None)
            if key in entries:
                break
        shape = megatron_shape(row, config)
        expected[key] = shape if layer is None else (config.num_layers, *shape)
        located.append((row, key, layer))
    check_shapes({key: tuple(entry.size) for key, entry in entries.items()}, expected, path)
    placement = Placement(config, path)
    chunks: dict[str, list[tuple[tuple[int, ...], TensorRef]]] = {
        key: list(_chunks(path, prefix + key, entry, metadata)) for key, entry in entries.items()
    }
    for row, key, layer in located:
        for offsets, ref in chunks[key]:
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + ref.shape[0]:
                    continue
                offset = ref.offset + (layer - offsets[0]) * ref.strides[0] * ref.dtype.itemsize
                ref = replace(ref, offset=offset, shape=ref.shape[1:], strides=ref.strides[1:])
                offsets = offsets[1:]
            corner = (offsets[0], offsets[1] if len(offsets) == 2 else 0)
            placement.add(row, ref, [matrix_region(ref, corner, key)], None, is_replica=False)
    return placement.weights("")


def _chunks(
    path: Path, key: str, entry: TensorStorageMetadata, metadata: Metadata
) -> Iterator[tuple[tuple[int, ...], TensorRef]]:
    """The chunks of a stored tensor: offsets in it, and where each lies."""
    for chunk in entry.chunks:
        info = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise InputError(f"{path / METADATA}: does not say where a part of {key} lies: copy the checkpoint again")
        file = path / info.relative_path
        try:
            ref = describe_torch(file, info.offset, info.length)
        except InputError as error:
            if "refused" in str(error):
                raise
            raise InputError(
                f"{path}: {key} cannot be read, {file.name} is missing or damaged: copy it again"
            ) from error
        if not isinstance(ref, TensorRef) or tuple(ref.shape) != tuple(chunk.sizes):
            raise InputError(f"{file}: holds something else where {key} should be: copy the checkpoint again")
        yield tuple(chunk.offsets), ref


def read_metadata(path: Path) -> Metadata:
    """The checkpoint's `.metadata`, which may build nothing but metadata. Raises InputError."""
    file = path / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream, file).load()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file}: cannot be read: copy the checkpoint again") from error
    if not isinstance(metadata, Metadata):
        raise InputError(f"{file}: holds no checkpoint metadata")
    return metadata


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
