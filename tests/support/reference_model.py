"""CrystalCoder's forward pass in plain fp64 torch, written from the formulas, and random weights to feed it.

Independent of transformers and megatron-core on purpose: both implementations are tested against it. Weights are a dict
under Hugging Face names in the Hugging Face (Conv1D, [in, out]) layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig, MuP

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_layers=4,
    num_attention_heads=4,
    ffn_hidden_size=172,
    rotary_dim=4,
    max_sequence_length=64,
    mup=MuP(width_scale=0.25, output_alpha=2.22, embeddings_scale=14.6, scale_qk_dot_by_d=True),
)


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """fp32 weights with every bias and norm far from its usual start, so that a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    h, f = config.hidden_size, config.ffn_hidden_size

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std + mean

    weights = {"transformer.wte.weight": normal(config.vocab_size, h, std=0.08)}
    for i in range(config.num_layers):
        layer = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            weights[f"{layer}{norm}.weight"] = normal(h, std=0.3, mean=1.0)
            weights[f"{layer}{norm}.bias"] = normal(h, std=0.3)
        for name, rows, columns in (
            ("attn.c_attn", h, 3 * h),
            ("attn.c_proj", h, h),
            ("mlp.c_fc", h, f),
            ("mlp.c_fc2", h, f),
            ("mlp.c_proj", f, h),
        ):
            weights[f"{layer}{name}.weight"] = normal(rows, columns, std=1.5 * rows**-0.5)
            weights[f"{layer}{name}.bias"] = normal(columns, std=0.3)
    weights["transformer.ln_f.weight"] = normal(h, std=0.3, mean=1.0)
    weights["transformer.ln_f.bias"] = normal(h, std=0.3)
    return weights


def reference_logits(weights: dict[str, Tensor], config: ModelConfig, tokens_bs: Tensor) -> Tensor:
    """Logits (b, s, v) in the weights' dtype: fp64 weights make it a reference."""
    b, s = tokens_bs.shape
    n, d, r = config.num_attention_heads, config.head_dim, config.rotary_dim
    embedding = weights["transformer.wte.weight"]
    dtype = embedding.dtype
    angles = torch.arange(s, dtype=dtype)[:, None] * config.rotary_base ** (-torch.arange(0, r, 2, dtype=dtype) / r)
    cos, sin = angles.cos(), angles.sin()

    def norm(x: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
        normed = (x - mean) / torch.sqrt(variance + config.layernorm_epsilon)
        return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def rotate(x_bnsd: Tensor) -> Tensor:
        out = x_bnsd.clone()
        even, odd = x_bnsd[..., 0:r:2], x_bnsd[..., 1:r:2]
        out[..., 0:r:2] = even * cos - odd * sin
        out[..., 1:r:2] = odd * cos + even * sin
        return out

    x = embedding[tokens_bs] * config.mup.embeddings_scale
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    for i in range(config.num_layers):
        layer = f"transformer.h.{i}."
        qkv = linear(norm(x, layer + "ln_1"), layer + "attn.c_attn")
        q, k, v = (part.view(b, s, n, d).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = rotate(q) @ rotate(k).transpose(2, 3) / (d if config.mup.scale_qk_dot_by_d else d**0.5)
        attended = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).reshape(b, s, n * d), layer + "attn.c_proj")
        h = norm(x, layer + "ln_2")
        gate = linear(h, layer + "mlp.c_fc2")
        x = x + linear(linear(h, layer + "mlp.c_fc") * gate * torch.sigmoid(gate), layer + "mlp.c_proj")
    head = weights["transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T * (config.mup.output_alpha * config.mup.width_scale)
