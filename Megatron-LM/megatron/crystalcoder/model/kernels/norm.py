"""Residual addition and LayerNorm in one pass.

Shape letters: s sequence, b micro-batch, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.crystalcoder.model.kernels.compiled import maybe_compiled


def add_norm(
    residual_sbh: Tensor,
    x_sbh: Tensor,
    bias_h: Tensor | None,
    weight_h: Tensor,
    shift_h: Tensor,
    eps: float,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum residual + x (+ bias), and its LayerNorm with this weight and shift; both (s, b, h).

    `x` is overwritten where that saves a tensor: it must be a product's output that nobody else needs.
    """
    return _AddNorm.apply(residual_sbh, x_sbh, bias_h, weight_h, shift_h, eps, compiled)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        eps: float,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = maybe_compiled(_add_norm, compiled)(residual, x, bias, weight, shift, eps)
        ctx.save_for_backward(total, mean, rstd, weight, shift)
        ctx.has_bias, ctx.compiled = bias is not None, compiled
        return total, normed

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, by_normed: Tensor) -> Any:
        total, mean, rstd, weight, shift = ctx.saved_tensors
        backward = maybe_compiled(_add_norm_gradient, ctx.compiled)
        by_sum, by_weight, by_shift = backward(by_total, by_normed, total, mean, rstd, weight, shift)
        by_bias = by_sum.flatten(0, -2).sum(0) if ctx.has_bias else None
        return by_sum, by_sum, by_bias, by_weight, by_shift, None, None


def _add_norm(
    residual: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = residual + x if bias is None else residual + (x + bias)
    normed, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight, shift, eps)
    return total, normed, mean, rstd


def _add_norm_gradient(
    by_total: Tensor, by_normed: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_weight, by_shift = torch.ops.aten.native_layer_norm_backward(
        by_normed, total, total.shape[-1:], mean, rstd, weight, shift, [True, True, True]
    )
    return by_x + by_total, by_weight, by_shift
