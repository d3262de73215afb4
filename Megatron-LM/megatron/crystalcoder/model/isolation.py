"""Attention within documents: rows that hold several give the same losses as each document alone.

The number of each token's document, (b, s), goes through the model in the place of megatron-core's attention mask: as
an argument, so that recomputation and pipelining see that of their own micro-batch. Rotary angles are those of the
positions given to the model, which start again at 0 in each document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend_in_documents(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, documents_bs: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over the earlier tokens of the same document; (b, n, s, d)."""
    if q_bnsd.is_cuda:
        return _flex(q_bnsd, k_bnsd, v_bnsd, documents_bs, scale)
    return torch.nn.functional.scaled_dot_product_attention(
        q_bnsd, k_bnsd, v_bnsd, attn_mask=document_mask(documents_bs), scale=scale
    )


def document_mask(documents_bs: Tensor) -> Tensor:
    """True where a query (row) sees a key (column): (b, 1, s, s)."""
    s = documents_bs.shape[1]
    same = documents_bs[:, None, :, None] == documents_bs[:, None, None, :]
    return same & torch.ones(s, s, dtype=torch.bool, device=documents_bs.device).tril()


def _flex(
    q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, documents_bs: Tensor, scale: float, *, compiled: bool = True
) -> Tensor:
    """The same by torch's flex attention, which skips the blocks between documents altogether."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled_flex() if compiled else flex_attention
    return attend(q_bnsd, k_bnsd, v_bnsd, block_mask=_blocks(documents_bs), scale=scale)


def _blocks(documents_bs: Tensor) -> Any:
    """flex attention's mask of these documents. All layers get one, made by the first: it looks at every pair of tokens
    and launches dozens of kernels."""
    from torch.nn.attention.flex_attention import create_block_mask

    global _last_blocks
    # An address alone would be another micro-batch's, too; this one's stays taken as long as its tensor is kept here.
    # By address all the same: recomputed layers get another tensor of the same memory.
    key = (documents_bs.data_ptr(), documents_bs.shape, documents_bs._version)
    if _last_blocks is None or _last_blocks[0] != key:

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents_bs[batch, query] == documents_bs[batch, key])

        b, s = documents_bs.shape
        blocks = create_block_mask(sees, b, None, s, s, device=str(documents_bs.device))
        _last_blocks = (key, documents_bs, blocks)
    return _last_blocks[2]


_last_blocks: tuple[Any, Tensor, Any] | None = None


def _compiled_flex() -> Any:
    global _flex_attention
    if _flex_attention is None:
        from torch.nn.attention.flex_attention import flex_attention

        _flex_attention = torch.compile(flex_attention, dynamic=False)
    return _flex_attention


_flex_attention: Any = None


def turn_by_given_positions(model: Any) -> None:
    """Have the model's rotary angles follow `position_ids` in calls that come with document numbers."""
    given: list[Tensor | None] = [None]

    def note_positions(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        documents = arguments[2] if len(arguments) > 2 else keywords.get("attention_mask")
        given[0] = None if documents is None else arguments[1]

    def of_these_positions(module: torch.nn.Module, arguments: Any, angles_s11d: Tensor) -> Tensor:
        if given[0] is None:
            return angles_s11d
        return angles_s11d[given[0].t(), 0]  # (s, b, 1, d)

    model.register_forward_pre_hook(note_positions, with_kwargs=True)
    model.rotary_pos_emb.register_forward_hook(of_these_positions)
