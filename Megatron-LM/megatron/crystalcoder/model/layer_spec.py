"""Which modules a CrystalCoder layer is made of, in megatron-core's terms; without Transformer Engine or Apex."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.crystalcoder.model.attention import CausalAttention
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.kernels.linear import ColumnLinear, RowLinear
from megatron.crystalcoder.model.layer import FusedLayer


@dataclass
class CoreConfig(TransformerConfig):
    """megatron-core's configuration, and how the layers carry it out."""

    speed: Speed = field(default_factory=Speed)


class LayerNorm(torch.nn.LayerNorm):
    """Plain LayerNorm with weight and bias, whose gradients megatron-core sums over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - not a declared attribute


def crystalcoder_block_spec(config: CoreConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = LayerNorm
    layer.submodules.pre_mlp_layernorm = LayerNorm
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = CausalAttention
    if config.speed.fusions & {"norm", "swiglu", "rotary", "wgrad"}:
        layer.module = FusedLayer
    if "wgrad" in config.speed.fusions:
        attention.linear_qkv = mlp.linear_fc1 = ColumnLinear
        attention.linear_proj = mlp.linear_fc2 = RowLinear
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=LayerNorm)
