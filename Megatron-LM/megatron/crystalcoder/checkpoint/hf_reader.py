"""Read a Hugging Face checkpoint tensor by tensor: .bin or safetensors, in one file or many."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.hf_config import from_hf, read_json
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import logical_shapes

# The attention's causal mask and its fill value: buffers that older transformers stored.
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class HFWeights:
    """The logical tensors of a Hugging Face directory.

    Names and shapes are checked when it is opened; a tensor is read when it is asked for, and nothing else is kept in
    memory: each read maps its file and lets it go. `lm_head.weight` under a tied head must equal the embedding.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = from_hf(read_json(path / "config.json"), path / "config.json")
        self._file_of: dict[str, Path] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, listed in _weight_files(path).items():
            stored = _describe(file)
            for name in listed or stored:
                if name not in stored:
                    raise InputError(f"{file}: tensor {name} is missing, though the index puts it there")
                if _BUFFER.fullmatch(name):
                    continue
                shapes[name], dtype = stored[name]
                if dtype not in SAFETENSORS_DTYPES.values():
                    raise InputError(f"{file}: tensor {name} is stored as {dtype}: take weights that are not quantised")
                self._dtypes[name] = dtype
                self._file_of[name] = file
        expected = logical_shapes(self.config)
        if self.config.tie_word_embeddings and _HEAD in shapes:
            expected[_HEAD] = expected[_EMBEDDING]
        check_shapes(shapes, expected, path)

    def names(self) -> Iterable[str]:
        return logical_shapes(self.config)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        tensor = _read(self._file_of[name], name)
        if name == _EMBEDDING and self.config.tie_word_embeddings and _HEAD in self._file_of:
            head = _read(self._file_of[_HEAD], _HEAD)
            if not torch.equal(head, tensor):
                raise InputError(
                    f"{self.path}: {_HEAD} differs from {_EMBEDDING}, but config.json says that they are tied: "
                    'set "tie_word_embeddings": false or remove the stale one'
                )
        return tensor


def _weight_files(path: Path) -> dict[Path, list[str] | None]:
    """Each file of weights with the tensors that the index expects in it (None: no index, take what it holds)."""
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise InputError(f"{path}: holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return {found: None}
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{found}: holds no weight_map: copy the index again")
    files: dict[Path, list[str] | None] = {}
    for name, file_name in weight_map.items():
        names = files.setdefault(path / str(file_name), [])
        assert names is not None
        names.append(name)
    return files


def _describe(file: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype (a name, where it is none that weights come in) of every tensor of a file, from its header."""
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return {
                name: (tuple(piece.get_shape()), SAFETENSORS_DTYPES.get(piece.get_dtype(), piece.get_dtype()))
                for name, piece in slices.items()
            }
    content = safe_load.load(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{file}: is not a state dict of tensors")
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def _read(file: Path, name: str) -> Tensor:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            return opened.get_tensor(name)
    return safe_load.load(file)[name].clone(memory_format=torch.contiguous_format)


def _open_safetensors(file: Path) -> safe_open:
    if not file.is_file():
        raise InputError(f"{file}: no such file: the checkpoint is incomplete, copy it again")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{file}: cannot be read, the file is damaged or cut short: copy it again") from error
