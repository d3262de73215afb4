"""Does a converted checkpoint compute the same? Logits of both sides, one tensor in memory at a time.

Written to share nothing with the conversion that it checks: files are read by torch.load and safetensors,
tensor-parallel shards are joined whole, and each format's forward pass uses its tensors as that format arranges them. A
mistake in the table of weights shows here as other logits.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.hf_reader import weight_files
from megatron.crystalcoder.checkpoint.open import Checkpoint
from megatron.crystalcoder.checkpoint.torch_dist_reader import read_metadata
from megatron.crystalcoder.checkpoint.window import opened
from megatron.crystalcoder.model.config import ModelConfig

Weight = Callable[[str], Tensor]  # a tensor by its name in the Hugging Face or megatron-core model, in fp32
NUM_PROMPTS, _TOKENS = 2, 12
_SMALL_FILE = 100_000_000  # bytes


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart. kl: mean over tokens of KL(first || second), in nats."""

    max_abs: float
    kl: float
    largest_logit: float

    def __str__(self) -> str:
        return f"max abs difference {self.max_abs:.2e} (largest {self.largest_logit:.3g}), KL {self.kl:.2e}"


def compare_logits(first: Checkpoint, second: Checkpoint, config: ModelConfig) -> Difference:
    """Logits of both on the same few tokens. config: the model's own, unpadded sizes and its muP constants."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (NUM_PROMPTS, _TOKENS), generator=generator)
    one, other = (_logits(checkpoint, config, tokens) for checkpoint in (first, second))
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (one, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Difference(float((one - other).abs().max()), float(kl.clamp(min=0)), float(one.abs().max()))


def refuse_other_logits(difference: Difference, *, is_cast: bool, where: Path) -> None:
    """Raise InputError when logits differ by more than rounding (is_cast: of the new dtype) explains."""
    far = difference.kl > 0.1 if is_cast else difference.max_abs > 1e-3 * difference.largest_logit
    if far or not difference.max_abs < float("inf"):
        raise InputError(f"{where}: computes other logits than its source: {difference}: not written; report this")


def _logits(checkpoint: Checkpoint, config: ModelConfig, tokens_bs: Tensor) -> Tensor:
    weight = _hf_weight(checkpoint) if checkpoint.format == "hf" else _megatron_weight(checkpoint)
    block = _hf_block if checkpoint.format == "hf" else _megatron_block
    embedding = "transformer.wte.weight" if checkpoint.format == "hf" else "embedding.word_embeddings.weight"
    last_norm = "transformer.ln_f" if checkpoint.format == "hf" else "decoder.final_layernorm"
    head = embedding
    if not config.tie_word_embeddings:
        head = "lm_head.weight" if checkpoint.format == "hf" else "output_layer.weight"
    elif checkpoint.format in ("torch", "legacy") and checkpoint.pipeline_parallel > 1:
        head = "output_layer.weight"
    with torch.no_grad():
        x_bsh = weight(embedding)[tokens_bs] * config.mup.embeddings_scale
        for layer in range(config.num_layers):
            x_bsh = block(weight, config, layer, x_bsh)
        x_bsh = _norm(weight, config, last_norm, x_bsh)
        return (x_bsh @ weight(head)[: config.vocab_size].t()) * config.mup.output_scale


def _norm(weight: Weight, config: ModelConfig, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(
        x, (config.hidden_size,), weight(f"{name}.weight"), weight(f"{name}.bias"), config.layernorm_epsilon
    )


def _attention(q_bsnd: Tensor, k_bsnd: Tensor, v_bsnd: Tensor, config: ModelConfig) -> Tensor:
    """Causal attention with rotary positions over neighbouring pairs of the first `rotary_dim` of each head's dims."""
    length, r = q_bsnd.shape[1], config.rotary_dim
    frequencies = config.rotary_base ** (-torch.arange(0, r, 2, dtype=torch.float32) / r)
    angles_sr = torch.arange(length)[:, None] * frequencies

    def rotated(x_bsnd: Tensor) -> Tensor:
        turned = x_bsnd.clone()
        cos, sin = angles_sr.cos()[:, None], angles_sr.sin()[:, None]
        even, odd = x_bsnd[..., 0:r:2], x_bsnd[..., 1:r:2]
        turned[..., 0:r:2], turned[..., 1:r:2] = even * cos - odd * sin, odd * cos + even * sin
        return turned.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        rotated(q_bsnd), rotated(k_bsnd), v_bsnd.transpose(1, 2), is_causal=True, scale=config.softmax_scale
    )
    return out.transpose(1, 2).flatten(2)


def _hf_block(weight: Weight, config: ModelConfig, layer: int, x: Tensor) -> Tensor:
    """Conv1D layers ([in, out]); all q, all k, all v; gate and linear branch apart."""
    name = f"transformer.h.{layer}."

    def linear(part: str, y: Tensor) -> Tensor:
        return y @ weight(f"{name}{part}.weight") + weight(f"{name}{part}.bias")

    qkv = linear("attn.c_attn", _norm(weight, config, f"{name}ln_1", x))
    q, k, v = (part.unflatten(-1, (config.num_attention_heads, -1)) for part in qkv.chunk(3, -1))
    x = x + linear("attn.c_proj", _attention(q, k, v, config))
    y = _norm(weight, config, f"{name}ln_2", x)
    return x + linear("mlp.c_proj", linear("mlp.c_fc", y) * F.silu(linear("mlp.c_fc2", y)))


def _megatron_block(weight: Weight, config: ModelConfig, layer: int, x: Tensor) -> Tensor:
    """Linear layers ([out, in]); q, k, v of each head together; gate above linear branch."""
    name = f"decoder.layers.{layer}."

    def linear(part: str, y: Tensor) -> Tensor:
        return F.linear(y, weight(f"{name}{part}.weight"), weight(f"{name}{part}.bias"))

    qkv = linear("self_attention.linear_qkv", _norm(weight, config, f"{name}input_layernorm", x))
    q, k, v = qkv.unflatten(-1, (config.num_attention_heads, 3, config.head_dim)).unbind(-2)
    x = x + linear("self_attention.linear_proj", _attention(q, k, v, config))
    y = linear("mlp.linear_fc1", _norm(weight, config, f"{name}pre_mlp_layernorm", x))
    gate, up = y.chunk(2, -1)
    return x + linear("mlp.linear_fc2", F.silu(gate) * up)


def _loader() -> Callable[[Path], Any]:
    """torch.load that maps files. Small ones stay mapped; of large ones every page read would stay in memory."""
    small: dict[Path, Any] = {}

    def load(file: Path) -> Any:
        if file in small:
            return small[file]
        content = safe_load.load(file)
        if file.stat().st_size <= _SMALL_FILE:
            small[file] = content
        return content

    return load


def _hf_weight(checkpoint: Checkpoint) -> Weight:
    files: dict[str, Path] = {}
    load = _loader()
    for file, listed in weight_files(checkpoint.path).items():
        names = listed or _names_in(file)
        files |= dict.fromkeys(names, file)

    def read(name: str) -> Tensor:
        file = files[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name).float()
        return load(file)[name].float()

    return read


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    return list(safe_load.load(file))


def _megatron_weight(checkpoint: Checkpoint) -> Weight:
    if checkpoint.format == "torch_dist":
        return _torch_dist_weight(checkpoint)
    layout, load = checkpoint.layout, _loader()
    assert layout is not None

    def place(name: str) -> tuple[int, str, str]:
        """Pipeline rank, the chunk's key in the rank's file, and the name there."""
        chunk, local = 0, name
        if name.startswith("decoder.layers."):
            layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
            chunk = next(c for c in range(layout.num_chunks) if int(layer) in layout.layers(c))
            local = f"decoder.layers.{int(layer) - layout.layers(chunk).start}.{rest}"
        elif not name.startswith("embedding."):
            chunk = layout.num_chunks - 1
        virtual_rank, pp_rank = divmod(chunk, layout.pipeline_parallel)
        return pp_rank, "model" if layout.virtual == 1 else f"model{virtual_rank}", local

    def read(name: str) -> Tensor:
        pp_rank, key, local = place(name)
        shards = []
        for tp_rank in range(layout.tensor_parallel):
            file = rank_file(checkpoint.folder, tp_rank, pp_rank, layout.pipeline_parallel)
            model = load(file)[key]
            shards.append(_legacy(model, local) if checkpoint.format == "legacy" else _mcore(model, local))
        return _joined(name, shards)

    return read


def _joined(name: str, shards: list[Tensor]) -> Tensor:
    """One tensor of all ranks' pieces: fc1 by halves, column-parallel weights below, row-parallel ones beside."""
    if "linear_fc1" in name:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves]).float()
    if "linear_qkv" in name or "embedding" in name or "output_layer" in name:
        return torch.cat(shards).float()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(shards, 1).float()
    return shards[0].float()


_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LEGACY = {
    "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "post_attention_norm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def _fused(name: str) -> str:
    for plain, fused in _FUSED.items():
        name = name.replace(plain, fused)
    return name


def _mcore(model: dict[str, Tensor], name: str) -> Tensor:
    return model[name] if name in model else model[_fused(name)]


def _legacy(model: dict[str, Any], name: str) -> Tensor:
    """The reference's tree of dictionaries, whose encoder is flat."""
    language = model.get("language_model", {})
    if name.startswith("embedding."):
        return language["embedding"]["word_embeddings"]["weight"]
    if name.startswith("output_layer."):
        return (model.get("word_embeddings_for_head") or language["output_layer"])["weight"]
    inner = name.removeprefix("decoder.").replace("final_layernorm", "final_norm")
    for core, theirs in _LEGACY.items():
        inner = inner.replace(core, theirs)
    return language["encoder"][inner]


def _torch_dist_weight(checkpoint: Checkpoint) -> Weight:
    metadata = read_metadata(checkpoint.folder)
    entries = metadata.state_dict_metadata

    def read(name: str) -> Tensor:
        layer, key = None, name
        if name.startswith("decoder.layers.") and name not in entries and _fused(name) not in entries:
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer, key = int(number), f"decoder.layers.{rest}"
        key = key if key in entries else _fused(key)
        entry: Any = entries[key]
        shape = entry.size if layer is None else entry.size[1:]
        full = None
        for index, info in metadata.storage_data.items():
            if index.fqn != key:
                continue
            offsets = list(index.offset)
            if layer is not None and offsets[0] > layer:
                continue
            piece = None
            if layer is None or offsets[0] == layer or len(entry.chunks) < entry.size[0]:
                with opened(checkpoint.folder / info.relative_path, info.offset, info.length) as part:
                    piece = torch.load(io.BufferedReader(part, 1 << 20), weights_only=True)
            if piece is None or (layer is not None and layer >= offsets[0] + piece.shape[0]):
                continue
            if layer is not None:
                piece, offsets = piece[layer - offsets[0]], offsets[1:]
            if piece.shape == shape:
                return piece.float()
            full = torch.full(shape, float("nan")) if full is None else full
            full[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] = piece
        assert full is not None
        return full

    return read
