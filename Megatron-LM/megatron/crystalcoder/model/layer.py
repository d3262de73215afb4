"""A CrystalCoder layer whose passes over the activations are fused; weights and names are megatron-core's layer's.

    x = x + Attn(LN(x));  x = x + MLP(LN(x))

Shape letters: s sequence, b micro-batch, h hidden, n heads, d head dim, f ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.crystalcoder.model.kernels.norm import add_norm
from megatron.crystalcoder.model.kernels.rotary import rotate_in_place
from megatron.crystalcoder.model.kernels.swiglu import swiglu


class FusedLayer(TransformerLayer):
    """megatron-core's TransformerLayer with its own forward pass: each fusion can be left out by itself.

    The linear layers are called as modules, so that whatever wraps them (adapters) stays in the path.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        speed = self.config.speed
        self.fusions, self.compiled = speed.fusions, speed.compiles_ops
        # The bias is then added inside the product instead of being handed on.
        self.mlp.linear_fc1.skip_bias_add = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """(s, b, h) -> (s, b, h), and no cross-attention context. With sequence parallelism s is this rank's part.

        attention_mask: None, or the number of each token's document (b, s), see CausalAttention.
        """
        x_sbh = hidden_states
        attended = self._attend(self.input_layernorm(x_sbh), rotary_pos_emb, attention_mask)
        norm = self.pre_mlp_layernorm
        if "norm" in self.fusions:
            await_parameters(norm)
            x_sbh, normed = add_norm(x_sbh, *attended, norm.weight, norm.bias, norm.eps, compiled=self.compiled)
        else:
            x_sbh = _added(x_sbh, *attended)
            normed = norm(x_sbh)
        return _added(x_sbh, *self._mlp(normed)), None

    def _attend(self, x_sbh: Tensor, rotary: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        attention = self.self_attention
        d = attention.hidden_size_per_attention_head
        qkv, _ = attention.linear_qkv(x_sbh)
        if "rotary" in self.fusions:
            qkv = rotate_in_place(
                qkv, rotary, head_dim=d, interleaved=self.config.rotary_interleaved, compiled=self.compiled
            )
        q, k, v = qkv.unflatten(-1, (-1, 3, d)).unbind(3)
        if "rotary" not in self.fusions:
            q, k = (apply_rotary_pos_emb(each, rotary, config=self.config) for each in (q, k))
        if attention.checkpoint_core_attention and self.training:
            out = checkpoint(attention.core_attention, False, q, k, v, documents)
        else:
            out = attention.core_attention(q, k, v, documents)
        return attention.linear_proj(out)

    def _mlp(self, x_sbh: Tensor) -> tuple[Tensor, Tensor | None]:
        both, _ = self.mlp.linear_fc1(x_sbh)
        if "swiglu" in self.fusions:
            return self.mlp.linear_fc2(swiglu(both, compiled=self.compiled))
        gate, linear = both.chunk(2, dim=-1)
        return self.mlp.linear_fc2(torch.nn.functional.silu(gate) * linear)


def await_parameters(module: torch.nn.Module) -> None:
    """What calling `module` would do before its forward pass: wait for weights that other ranks are still sending.

    For whoever uses a module's weights without calling it.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def _added(residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return residual + x if bias is None else residual + (x + bias)
