"""Matrix products of a linear layer: forward, by the input, by the weight; and which library computes them.

On CUDA and in bf16 torch's own choice is the best one. In fp32 on AMD's CPUs the MKL that torch's wheels bring runs its
AVX2 code even where there is AVX-512; oneDNN, also in the wheels, is then twice as fast, in the same arithmetic.

Shape letters: t tokens, i inputs, o outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def _onednn_beats_mkl() -> bool:
    """Whether fp32 products go to oneDNN. Told by the CPU's name, not timed: a run must repeat itself to the bit."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.is_file() and "AuthenticAMD" in info.read_text()


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_beats_mkl()


def operand(x_ti: Tensor) -> Tensor:
    """What the products take of x: itself. (fp8 takes something else: see `fp8`.)"""
    return x_ti


gradient_operand = operand


def forward(x_ti: Tensor, weight_oi: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """x W^T + b, (t, o); t may be several dimensions."""
    if _by_onednn(x_ti):
        return torch.ops.mkldnn._linear_pointwise(x_ti, weight_oi, bias_o, "none", [], "")
    return torch.nn.functional.linear(x_ti, weight_oi, bias_o)


def by_input(gradient_to: Tensor, weight_oi: Tensor) -> Tensor:
    """The input's gradient g W, (t, i)."""
    if _by_onednn(gradient_to):
        return torch.ops.mkldnn._linear_pointwise(gradient_to, weight_oi.t(), None, "none", [], "")
    return gradient_to @ weight_oi


def by_weight(gradient_to: Tensor, x_ti: Tensor) -> Tensor:
    """The weight's gradient g^T x, (o, i); x may have several dimensions in the place of t."""
    x_ti = x_ti.flatten(0, -2)
    if _by_onednn(x_ti):
        return torch.ops.mkldnn._linear_pointwise(gradient_to.t(), x_ti.t(), None, "none", [], "")
    return gradient_to.t() @ x_ti


def add_by_weight(total_oi: Tensor, gradient_to: Tensor, x_ti: Tensor) -> None:
    """Add g^T x to the fp32 `total_oi`; x as in `by_weight`.

    On CUDA the sum stays in fp32 from the first product on, also for bf16, where torch can do that.
    """
    x_ti = x_ti.flatten(0, -2)
    if total_oi.dtype == x_ti.dtype and not _by_onednn(x_ti):
        total_oi.addmm_(gradient_to.t(), x_ti)
    elif x_ti.is_cuda and cuda_adds_to_fp32():
        torch.addmm(total_oi, gradient_to.t(), x_ti, out_dtype=total_oi.dtype, out=total_oi)
    else:
        total_oi.add_(by_weight(gradient_to, x_ti))


@cache
def cuda_adds_to_fp32() -> bool:
    """Whether this torch adds a bf16 product to an fp32 matrix in one call: 2.10 does; 2.8 and 2.9 know the call, and
    want both in bf16."""
    total, ones = torch.zeros(16, 16, device="cuda"), torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 16).all())
