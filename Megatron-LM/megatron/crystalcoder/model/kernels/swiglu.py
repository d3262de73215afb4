"""SwiGLU in one pass each way, keeping nothing but its input.

Shape letters: s sequence, b micro-batch, f ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.crystalcoder.model.kernels.compiled import maybe_compiled


def swiglu(x_sb2f: Tensor, *, compiled: bool = False) -> Tensor:
    """silu(gate) * linear, (s, b, f); the input's last dimension is [gate, linear] (Shazeer 2020, "GLU Variants")."""
    return _SwiGLU.apply(x_sb2f, compiled)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.compiled = compiled
        return maybe_compiled(_product, compiled)(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (_fused_gradient if ctx.compiled else _gradient)(gradient, x), None


def _product(x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * linear


def _gradient(gradient: Tensor, x: Tensor) -> Tensor:
    gate, linear = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    by_gate, by_linear = out.chunk(2, dim=-1)
    torch.mul(gradient, torch.nn.functional.silu(gate), out=by_linear)
    torch.ops.aten.silu_backward.grad_input(gradient * linear, gate, grad_input=by_gate)
    return out


def _gradient_formula(gradient: Tensor, x: Tensor) -> Tensor:
    gate, linear = (half.float() for half in x.chunk(2, dim=-1))
    upstream = gradient.float()
    sigmoid = torch.sigmoid(gate)
    by_gate = upstream * linear * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([by_gate, upstream * gate * sigmoid], dim=-1).to(x.dtype)


def _fused_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    return maybe_compiled(_gradient_formula, True)(gradient, x)
