"""Write a Hugging Face checkpoint's weights tensor by tensor: safetensors, sharded, with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron.crystalcoder.checkpoint.blocks import Files
from megatron.crystalcoder.checkpoint.tensor_files import SAFETENSORS_DTYPES, TensorRef, describe_safetensors
from megatron.crystalcoder.checkpoint.weights import DTypes, WeightSource, logical_shapes
from megatron.crystalcoder.model.config import ModelConfig

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_weights(target: Path, source: WeightSource, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write all tensors into `model*.safetensors`, holding one at a time; several files get an index."""
    places = lay_out_hf(target, source.config, {name: source.dtype(name) for name in source.names()}, max_shard_bytes)
    with Files(writable=True) as files:
        for name, ref in places.items():
            files.write(ref.file, ref.offset, source.read(name).contiguous().flatten().view(torch.uint8).numpy())


def lay_out_hf(
    target: Path, config: ModelConfig, dtypes: DTypes, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, TensorRef]:
    """Make `model*.safetensors`, and an index for several, with all values zero. Where each tensor's values go."""
    shapes = logical_shapes(config)
    sizes = {name: _bytes(shapes[name], dtypes[name]) for name in shapes}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    places: dict[str, TensorRef] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= _lay_out_safetensors(target / file, {name: (shapes[name], dtypes[name]) for name in names})
    if len(shards) > 1:
        weight_map = {name: ref.file.name for name, ref in places.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)
    return places


def _lay_out_safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, TensorRef]:
    """The format: header length (8 bytes, little endian), a JSON header with offsets, then the tensors.

    Written here because the library's own writer wants all tensors in memory together.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + _bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.truncate(stream.tell() + offset)
    return describe_safetensors(path)


def _bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object, its keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
