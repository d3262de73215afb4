"""Causal self-attention as a megatron-core core-attention module: fused by torch, or written out.

Shape letters: s sequence, b micro-batch, n heads, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.crystalcoder.model.isolation import attend_in_documents


class CausalAttention(torch.nn.Module):
    """softmax(q k^T * scale) v over a causal window; the scale is muP's 1/d when the model says so.

    Fused, torch picks the kernel (cuDNN, flash, memory-efficient, math), all of which keep the softmax in fp32 for bf16
    inputs. The signature is what megatron-core's SelfAttention builds its `core_attention` with.
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
        self.fused = "attention" in config.speed.fusions

    def forward(
        self, q_sbnd: Tensor, k_sbnd: Tensor, v_sbnd: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend over the whole causal window; returns (s, b, n*d).

        attention_mask: None, or the number of each token's document (b, s): then only within documents.
        """
        q_bnsd, k_bnsd, v_bnsd = (x.permute(1, 2, 0, 3) for x in (q_sbnd, k_sbnd, v_sbnd))
        if attention_mask is not None:
            out_bnsd = attend_in_documents(q_bnsd, k_bnsd, v_bnsd, attention_mask, self.scale)
        elif self.fused:
            out_bnsd = torch.nn.functional.scaled_dot_product_attention(
                q_bnsd, k_bnsd, v_bnsd, is_causal=True, scale=self.scale
            )
        else:
            out_bnsd = plain_attention(q_bnsd, k_bnsd, v_bnsd, self.scale)
        return out_bnsd.permute(2, 0, 1, 3).flatten(2)


def plain_attention(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, scale: float) -> Tensor:
    """The same operation by operation, softmax in fp32; keeps the s x s scores for the backward pass."""
    s = q_bnsd.shape[2]
    scores_bnss = (q_bnsd @ k_bnsd.transpose(2, 3)).float() * scale
    future_ss = torch.ones(s, s, dtype=torch.bool, device=q_bnsd.device).triu(1)
    return scores_bnss.masked_fill(future_ss, float("-inf")).softmax(-1).to(v_bnsd.dtype) @ v_bnsd
