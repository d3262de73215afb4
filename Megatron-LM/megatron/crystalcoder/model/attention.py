"""Causal self-attention by torch's `scaled_dot_product_attention`, as a megatron-core core-attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.crystalcoder.model.isolation import attend_in_documents


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
        """Attend over the whole causal window; returns (s, b, n*d).

        attention_mask: None, or the number of each token's document (b, s): then only within documents.
        """
        q_bnsd, k_bnsd, v_bnsd = (x.permute(1, 2, 0, 3) for x in (q_sbnd, k_sbnd, v_sbnd))
        if attention_mask is not None:
            out_bnsd = attend_in_documents(q_bnsd, k_bnsd, v_bnsd, attention_mask, self.scale)
            return out_bnsd.permute(2, 0, 1, 3).flatten(2)
        out_bnsd = torch.nn.functional.scaled_dot_product_attention(
            q_bnsd, k_bnsd, v_bnsd, is_causal=True, scale=self.scale
        )
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)
