"""Read a Hugging Face checkpoint tensor by tensor: .bin or safetensors, in one file or many."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Block, Stored
from megatron.crystalcoder.checkpoint.hf_config import from_hf, read_json
from megatron.crystalcoder.checkpoint.placement import BlockWeights, matrix_region
from megatron.crystalcoder.checkpoint.tensor_files import (
    SAFETENSORS_DTYPES,
    TensorRef,
    describe_safetensors,
    describe_torch,
)
from megatron.crystalcoder.checkpoint.verify import check_shapes
from megatron.crystalcoder.checkpoint.weights import logical_shapes
from megatron.crystalcoder.checkpoint.window import Window

# The attention's causal mask and its fill value: buffers that older transformers stored.
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_hf(
    path: Path,
    describe: Callable[[Path], dict[str, TensorRef]] | None = None,
    exists: Callable[[Path], bool] = Path.is_file,
) -> BlockWeights:
    """The weights of a Hugging Face directory: names and shapes checked, nothing but headers read.

    `lm_head.weight` under a tied head is a copy of the embedding. describe, exists: give a file's tensors, and whether
    it is there, where the directory does not hold the weights themselves.
    """
    describe = describe or describe_file
    config = from_hf(read_json(path / "config.json"), path / "config.json")
    refs: dict[str, TensorRef] = {}
    files = weight_files(path, exists)
    indexed = {name for listed in files.values() for name in listed or ()}
    for file, listed in files.items():
        found = describe(file)
        # What the index passes over is looked at too, as transformers does: no tensor is dropped without a word.
        for name in [*(listed or ()), *(name for name in found if name not in indexed)]:
            if name not in found:
                raise InputError(f"{file}: tensor {name} is missing, though the index puts it there")
            if _BUFFER.fullmatch(name):
                continue
            ref = refs[name] = found[name]
            if ref.dtype not in SAFETENSORS_DTYPES.values():
                raise InputError(f"{file}: tensor {name} is stored as {ref.dtype}: take weights that are not quantised")
    expected = dict(logical_shapes(config))
    if config.tie_word_embeddings and HEAD in refs:
        expected[HEAD] = expected[EMBEDDING]
    check_shapes({name: ref.shape for name, ref in refs.items()}, expected, path)
    stored = {
        name: Stored(refs[name].dtype, shape, [[_block(refs[name])]]) for name, shape in logical_shapes(config).items()
    }
    if config.tie_word_embeddings and HEAD in refs:
        embedding = stored[EMBEDDING]
        embedding.copies.append([_block(refs[HEAD])])
        embedding.disagreement = (
            f"{path}: {HEAD} differs from {EMBEDDING}, but config.json says that they are tied: "
            'set "tie_word_embeddings": false or remove the stale one'
        )
        if refs[HEAD].dtype != embedding.dtype:
            raise InputError(embedding.disagreement)
    return BlockWeights(config, stored, (ref.record for ref in refs.values() if ref.record is not None))


def _block(ref: TensorRef) -> Block:
    if len(ref.shape) == 1:
        region = matrix_region(ref, (0, 0), str(ref.shape))
        return Block(ref.file, ref.offset, (0, 1), region.outer, False, ref.shape[0])
    region = matrix_region(ref, (0, 0), str(ref.shape))
    return Block(ref.file, ref.offset, region.outer, region.inner, region.flipped, region.pitch)


def weight_files(path: Path, exists: Callable[[Path], bool] = Path.is_file) -> dict[Path, list[str] | None]:
    """Each file of weights with the tensors that the index expects in it (None: no index, take what it holds)."""
    found = next((path / name for name in WEIGHT_FILES if exists(path / name)), None)
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


def describe_file(file: Path, window: Window | None = None) -> dict[str, TensorRef]:
    """Every tensor of a file of weights, from its header. window: where its bytes are read, if not from `file`."""
    if file.suffix == ".safetensors":
        return describe_safetensors(file, window)
    content = describe_torch(file, window=window)
    if not isinstance(content, dict) or not all(isinstance(value, TensorRef) for value in content.values()):
        raise InputError(f"{file}: is not a state dict of tensors")
    return content
