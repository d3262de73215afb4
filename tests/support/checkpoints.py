"""Small Hugging Face checkpoints on disk, as published ones are laid out, and ways to compare checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.crystalcoder.checkpoint.hf_config import hf_values
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.model.config import ModelConfig
from support.reference_model import TINY, random_weights


def save_hf(
    path: Path,
    weights: dict[str, Tensor],
    config: ModelConfig = TINY,
    *,
    shards: int = 3,
    buffers: bool = True,
    kind: Literal["bin", "safetensors"] = "bin",
    **config_values: Any,
) -> Path:
    """A checkpoint: sharded with an index (or one file), with the buffers that old transformers stored."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**hf_values(config), "model_type": "crystalcoder", **config_values}))
    stored = dict(weights)
    if buffers:
        for i in range(config.num_layers):
            stored[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
            stored[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    stem, save = ("pytorch_model", torch.save) if kind == "bin" else ("model", save_file)
    if shards == 1:
        save(stored, path / f"{stem}.{kind}")
        return path
    names = list(stored)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{kind}"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save({name: stored[name] for name in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def distinct_weights(config: ModelConfig = TINY, seed: int = 5) -> dict[str, Tensor]:
    """Random fp32 weights for every tensor of the model, an untied head included."""
    weights = random_weights(config, seed)
    if not config.tie_word_embeddings:
        head = torch.Generator().manual_seed(seed + 1)
        weights["lm_head.weight"] = torch.randn(config.vocab_size, config.hidden_size, generator=head)
    return weights


def assert_same_tensors(path: Path | str, weights: dict[str, Tensor] | WeightSource) -> None:
    """Every tensor of the checkpoint at `path` equals the given one, bit for bit and in dtype; none more, none less."""
    found = open_checkpoint(path).weights
    names = list(weights) if isinstance(weights, dict) else list(weights.names())
    assert set(found.names()) == set(names)
    for name in names:
        expected = weights[name] if isinstance(weights, dict) else weights.read(name)
        tensor = found.read(name)
        assert tensor.dtype == found.dtype(name) == expected.dtype, name
        assert torch.equal(tensor, expected), name
