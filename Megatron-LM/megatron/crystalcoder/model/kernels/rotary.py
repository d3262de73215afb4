"""Rotary position embedding that turns queries and keys where they stand, forwards and back.

Shape letters: s sequence, b micro-batch, n heads, d head dim, r rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron.crystalcoder.model.kernels.compiled import maybe_compiled


class RotaryTable(RotaryEmbedding):
    """megatron-core's angles as [cosines, sines], (s, 1, 1, r) in the activations' dtype, made once per length.

    Angles, cosine and sine are evaluated in fp32 and rounded afterwards, as everywhere in CrystalCoder.
    """

    def __init__(self, *args: Any, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype = dtype
        self._tables: dict[int, Tensor] = {}

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """The table of positions 0 to max_seq_len - 1."""
        if max_seq_len not in self._tables:
            self.get_emb(max_seq_len)  # moves the frequencies to this rank's device
            cosines, sines = self.get_cos_sin(max_seq_len)
            self._tables[max_seq_len] = torch.cat([cosines, sines], dim=-1)[:, None, None].to(self.dtype)
        return self._tables[max_seq_len]


def rotate_in_place(
    qkv_sbx: Tensor, table_sb1r: Tensor, *, head_dim: int, interleaved: bool, compiled: bool = False
) -> Tensor:
    """Turn the first r dims of each q and k by their position; v and the other dims stay. Changes and returns `qkv`.

    qkv: (s, b, n*3*d), each head's q, k and v side by side; no view, and nobody may need it as it was before (a linear
    layer's output is not needed for its own gradient). table: [cosines, sines] of each position, or with a dimension b
    of each token. Pairs are neighbours (2i, 2i+1) if interleaved, else (i, i + r/2) (Su et al. 2021, "RoFormer").
    """
    return _Rotate.apply(qkv_sbx, table_sb1r, head_dim, interleaved, compiled)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, head_dim: int, interleaved: bool, compiled: bool) -> Tensor:
        ctx.mark_dirty(qkv)
        ctx.table, ctx.settings = table, (head_dim, interleaved, compiled)
        _turn(qkv, table, 1.0, *ctx.settings)
        return qkv

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Turning back is the transpose. In place: the gradient was just put together from those of q, k and v.
        gradient = gradient.contiguous()
        _turn(gradient, ctx.table, -1.0, *ctx.settings)
        return gradient, None, None, None, None


def _turn(qkv: Tensor, table: Tensor, sign: float, head_dim: int, interleaved: bool, compiled: bool) -> None:
    turned = qkv.unflatten(-1, (-1, 3, head_dim))[..., :2, : table.shape[-1]]  # of q and k: (s, b, n, 2, r)
    if interleaved and not compiled and head_dim % 2 == 0:  # complex numbers must lie at even places
        _turn_pairs(turned, table, sign)
    else:
        turned.copy_(maybe_compiled(_turned, compiled)(turned, table, sign, interleaved))


def _turn_pairs(x: Tensor, table: Tensor, sign: float) -> None:
    """Turn neighbours as the complex numbers that they are: one pass instead of ten, and in place in fp32."""
    cos, sin = table[:, :, :, None].float().chunk(2, dim=-1)
    pairs = x.float().unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(torch.complex(cos, sin * sign))
    if x.dtype != torch.float32:
        x.copy_(pairs.flatten(-2))


def _turned(x: Tensor, table: Tensor, sign: float, interleaved: bool) -> Tensor:
    cos, sin = table[:, :, :, None].chunk(2, dim=-1)
    sin = sin * sign
    half = cos.shape[-1]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pairs = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
