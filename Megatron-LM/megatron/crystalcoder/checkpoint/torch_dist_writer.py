"""Lay out megatron-core's `torch_dist` format without a process group: its files, whole but for the tensors' values.

`megatron.core.dist_checkpointing.load` reads it with any model's `sharded_state_dict()`, at any TP and PP.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.tensor_files import TensorRef, describe_torch, save_torch
from megatron.crystalcoder.checkpoint.torch_dist_reader import COMMON, FORMAT, METADATA, stacked
from megatron.crystalcoder.checkpoint.weights import DTypes, megatron_dtype, megatron_shape, stage_rows
from megatron.crystalcoder.model.config import ModelConfig

MAX_FILE_BYTES = 5_000_000_000
# megatron-core's linear layers ask for their (empty) extra state when they load.
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def lay_out_torch_dist(
    iteration_dir: Path,
    config: ModelConfig,
    sets: Mapping[str, DTypes],
    args: argparse.Namespace,
    iteration: int,
    run: Mapping[str, Any],
) -> None:
    """Fill `iteration_dir` with .metadata, *.distcp, common.pt and metadata.json; values zero, checksums to come.

    sets: the weights' dtypes under the prefix "", and those of optimizer state like them under its own. run: what
    common.pt holds of a run beside its weights.
    """
    iteration_dir.mkdir(parents=True)
    data = DistFiles(iteration_dir)
    for prefix, dtypes in sets.items():
        for row in stage_rows(config):
            key, layer = stacked(row.sharded_name)
            shape, dtype = megatron_shape(row, config), megatron_dtype(row, dtypes)
            if layer is None:
                data.add_tensor(prefix + key, shape, (0,) * len(shape), shape, dtype)
            else:
                size, offsets = (config.num_layers, *shape), (layer, *[0] * len(shape))
                data.add_tensor(prefix + key, size, offsets, (1, *shape), dtype)
    for linear in _LINEARS:
        for layer in range(config.num_layers):
            data.add_object(f"decoder.layers.{linear}._extra_state/shard_{layer}_{config.num_layers}", [None])
    data.close()
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration, **run}
    save_torch(common, iteration_dir / COMMON)
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (iteration_dir / FORMAT).write_text(json.dumps(formats))


class DistFiles:
    """The .distcp files, one after the other, and the metadata that finds things in them.

    Each tensor lies there as torch.save writes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._file: BinaryIO = self._next()
        self._templates: dict[tuple[Any, ...], _Template] = {}
        self._tensors: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def add_tensor(
        self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """A place for the chunk at `offsets` of the tensor `key`, whose whole size is `size`."""
        template = self._templates.get((sizes, dtype))
        if template is None:
            template = self._templates[sizes, dtype] = _template(sizes, dtype)
        if self._file.tell() and self._file.tell() + template.nbytes > MAX_FILE_BYTES:
            self._file.close()
            self._number += 1
            self._file = self._next()
        entry = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
        )
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        self._place(MetadataIndex(key, chunk.offsets, len(entry.chunks)), template.nbytes)
        entry.chunks.append(chunk)
        self._file.write(template.before)
        self._file.seek(template.nbytes - len(template.before) - len(template.after), io.SEEK_CUR)
        self._file.write(template.after)

    def add_object(self, key: str, value: Any) -> None:
        """A small object, stored now."""
        stream = io.BytesIO()
        torch.save(value, stream)
        self._tensors[key] = BytesStorageMetadata()
        self._place(MetadataIndex(key), stream.tell())
        self._file.write(stream.getvalue())

    def close(self) -> None:
        """End the files and write `.metadata`."""
        self._file.close()
        metadata = Metadata(self._tensors, storage_data=self._storage, storage_meta=StorageMeta())
        with (self._folder / METADATA).open("wb") as stream:
            pickle.dump(metadata, stream)

    def _next(self) -> BinaryIO:
        return (self._folder / f"__0_{self._number}.distcp").open("wb")

    def _place(self, index: MetadataIndex, nbytes: int) -> None:
        self._storage[index] = _StorageInfo(f"__0_{self._number}.distcp", self._file.tell(), nbytes)


class _Template:
    """What torch.save writes before and after a tensor's values, and the size of all."""

    def __init__(self, before: bytes, after: bytes, nbytes: int) -> None:
        self.before, self.after, self.nbytes = before, after, nbytes


def _template(shape: tuple[int, ...], dtype: torch.dtype) -> _Template:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tensor.pt")
        save_torch(torch.empty(shape, dtype=dtype), file, with_values=False)
        ref = describe_torch(file)
        assert isinstance(ref, TensorRef)
        assert ref.record is not None
        nbytes, end = file.stat().st_size, ref.record.offset + ref.record.nbytes
        with file.open("rb") as stream:
            before = stream.read(ref.record.offset)
            stream.seek(end)
            return _Template(before, stream.read(), nbytes)
