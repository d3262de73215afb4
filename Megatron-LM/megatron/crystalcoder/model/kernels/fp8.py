"""Matrix products of a linear layer in 8-bit floating point, accumulated in fp32.

    x ~ x8 * max|x| / 448,  x8 = e4m3(x * 448 / max|x|);   y = (x8 W8^T) * scale_x * scale_W + b

Activations and weights are e4m3 (3 bits of mantissa), gradients e5m2 (a wider range), each with one scale for the whole
tensor, taken from its own largest number (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). Master weights,
sums and everything outside the products stay as they are. What is kept for the backward pass is x8.

The functions are those of `products`, for operands made by `operand` and `gradient_operand`.

Shape letters: t tokens, i inputs, o outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.model.kernels.compiled import maybe_compiled

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Sizes that the GPU's fp8 products take.
MULTIPLE = 16


class Fp8Tensor(NamedTuple):
    """Numbers in fp8 and the factor, fp32 (), that gives them their size."""

    numbers: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Fp8Products:
    """emulated: the same numbers by fp32 products of the rounded operands, anywhere. compiled: see `maybe_compiled`."""

    emulated: bool = False
    compiled: bool = False

    def operand(self, x_ti: Tensor) -> Fp8Tensor:
        """An activation or a weight, in e4m3."""
        return Fp8Tensor(*maybe_compiled(_quantised, self.compiled)(x_ti, E4M3))

    def gradient_operand(self, gradient_to: Tensor) -> Fp8Tensor:
        """In e5m2."""
        return Fp8Tensor(*maybe_compiled(_quantised, self.compiled)(gradient_to, E5M2))

    def forward(self, x_ti: Fp8Tensor, weight_oi: Tensor, bias_o: Tensor | None = None) -> Tensor:
        """x W^T + b, (t, o); t may be several dimensions."""
        flat = Fp8Tensor(x_ti.numbers.flatten(0, -2), x_ti.scale)
        out = self._product(flat, self.operand(weight_oi), weight_oi.dtype, bias_o, fast=True)
        return out.unflatten(0, x_ti.numbers.shape[:-1])

    def by_input(self, gradient_to: Fp8Tensor, weight_oi: Tensor) -> Tensor:
        """The input's gradient g W, (t, i)."""
        return self._product(gradient_to, self._turned(self.operand(weight_oi)), weight_oi.dtype)

    def by_weight(self, gradient_to: Fp8Tensor, x_ti: Fp8Tensor) -> Tensor:
        """The weight's gradient g^T x, fp32 (o, i)."""
        return self._product(self._turned(gradient_to), self._turned(x_ti), torch.float32)

    def add_by_weight(self, total_oi: Tensor, gradient_to: Fp8Tensor, x_ti: Fp8Tensor) -> None:
        """Add g^T x to the fp32 `total_oi`."""
        total_oi.add_(self.by_weight(gradient_to, x_ti))

    def _turned(self, x: Fp8Tensor) -> Fp8Tensor:
        """The transpose in memory of its own: a GPU's fp8 products want the summed dimension last in both operands."""
        flat = x.numbers.flatten(0, -2)
        turned = flat.t() if self.emulated else maybe_compiled(_transposed, self.compiled)(flat)
        return Fp8Tensor(turned, x.scale)

    def _product(
        self, a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
    ) -> Tensor:
        """a b^T + bias. fast: with a Hopper GPU's shorter sums, precise enough for the forward pass alone."""
        if self.emulated:
            out = a.numbers.float() @ b.numbers.float().t() * (a.scale * b.scale)
            return (out if bias is None else out + bias).to(dtype)
        inside = bias if dtype != torch.float32 else None  # an fp32 one is not taken
        out = torch._scaled_mm(
            a.numbers,
            b.numbers.t(),
            scale_a=a.scale,
            scale_b=b.scale,
            bias=inside,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        return out if bias is None or inside is not None else out.add_(bias)


def _quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _transposed(x: Tensor) -> Tensor:
    return x.t().contiguous()


def check_fp8(*, emulated: bool, sizes: dict[str, int]) -> None:
    """Raise InputError unless this machine has fp8 products (or they are emulated) and they take these sizes of one
    rank's tensors, told by name."""
    if not emulated and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        raise InputError(
            "--fp8 on: this machine has no GPU with fp8 products (H100, H200, or another of compute capability 8.9): "
            "drop it, or pass --fp8 emulated for the same numbers, slowly"
        )
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise InputError(
                f"--fp8: the {name} of one rank, {size}, is not a multiple of {MULTIPLE}, as fp8 products need it: "
                "drop it, or pad the FFN with --ffn-multiple-of 128"
            )
