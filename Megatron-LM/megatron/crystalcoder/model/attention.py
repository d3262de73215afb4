"""Causal self-attention by torch's `scaled_dot_product_attention`, as a megatron-core core-attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v over a causal window; the scale is muP's 1/d when the model says so.

    Torch picks the kernel (flash, memory-efficient, math), all of which keep the softmax in fp32 for bf16 inputs. The
    signature is what megatron-core's SelfAttention builds its `core_attention` with.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = config.softmax_scale if softmax_scale is None else softmax_scale

    def forward(
        self, q_sbnd: Tensor, k_sbnd: Tensor, v_sbnd: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend; returns (s, b, n*d). There is no mask but the causal one: rows are full windows."""
        if attention_mask is not None:
            raise ValueError("CausalAttention takes no attention mask: it is causal over the whole window")
        q_bnsd, k_bnsd, v_bnsd = (x.permute(1, 2, 0, 3) for x in (q_sbnd, k_sbnd, v_sbnd))
        out_bnsd = torch.nn.functional.scaled_dot_product_attention(
            q_bnsd, k_bnsd, v_bnsd, is_causal=True, scale=self.scale
        )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)
