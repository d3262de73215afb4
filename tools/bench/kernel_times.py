"""What each piece of a 7B layer takes on this device, and what of the peak it reaches: where MFU is lost.

Products are timed in bf16 at the FFN's own size and padded, and in fp8, beside a square product, the most that this
device does in practice; attention by each of torch's kernels; passes over memory by the bytes they must move.

Shape letters: t tokens, h hidden, f ffn, v vocab, n heads, d head dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.crystalcoder.model.kernels import products
from megatron.crystalcoder.model.kernels.fp8 import Fp8Products
from megatron.crystalcoder.model.kernels.loss import cross_entropy
from megatron.crystalcoder.model.kernels.norm import add_norm
from megatron.crystalcoder.model.kernels.rotary import rotate_in_place
from megatron.crystalcoder.model.kernels.swiglu import swiglu
from megatron.crystalcoder.platform import GroupStepAdamW
from tools.bench.kernel_checks import Sizes, rotary_table
from tools.bench.report import one_line

# The 7B model's own; `Sizes.ffn` is the padded one.
OWN_FFN = 10922
# Name, FLOPs, bytes, and what to run.
Piece = tuple[str, float, float, Callable[[], object]]
_KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Timing:
    """One piece: seconds (median), FLOPs that it is worth and bytes that it must move. failure: why there is none."""

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    failure: str = ""


def time_kernels(device: torch.device, z: Sizes, *, until: float = math.inf, rounds: int = 10) -> Iterator[Timing]:
    """All pieces, forward and backward where that is said. until: the clock's time from which on they are left out."""
    compiled = device.type == "cuda"
    for name, flops, moved, call in _pieces(device, z, compiled):
        if time.monotonic() > until:
            yield Timing(name, 0.0, failure="no time left")
            continue
        try:
            timing = Timing(name, _seconds(call, device, rounds), flops, moved)
        except Exception as error:  # noqa: BLE001 - a kernel that this device, or these sizes, do not have
            timing = Timing(name, 0.0, failure=one_line(error))
        yield timing


def _seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return median(times)


def _pieces(device: torch.device, z: Sizes, compiled: bool) -> Iterator[Piece]:
    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield from _products(draw, z, Fp8Products(emulated=device.type != "cuda", compiled=compiled))
    yield from _attentions(draw, z)
    yield from _passes(draw, z, rotary_table(z, device).bfloat16(), compiled)


def _products(draw: Callable[..., Tensor], z: Sizes, by: Fp8Products) -> Iterator[Piece]:
    t, h, f = z.seq * z.batch, z.hidden, z.ffn
    square = draw(2 * h, 2 * h)
    yield "square product, bf16", 2 * (2 * h) ** 3, 0, lambda: square @ square
    x, gradient = draw(t, h), draw(t, 2 * f)
    for name, size in (("own", min(OWN_FFN, f - 2)), ("padded", f)):
        yield f"FFN in, {name} size, bf16", 4 * t * h * size, 0, partial(products.forward, x, draw(2 * size, h))
    weight, total = draw(2 * f, h), draw(2 * f, h, dtype=torch.float32)
    flops = 4 * t * h * f
    yield "its input's gradient, bf16", flops, 0, lambda: products.by_input(gradient, weight)
    yield "its weight's, added in fp32", flops, 0, lambda: products.add_by_weight(total, gradient, x)
    yield "FFN in, fp8, rounding included", flops, 0, lambda: by.forward(by.operand(x), weight)
    yield "its input's gradient, fp8", flops, 0, lambda: by.by_input(by.gradient_operand(gradient), weight)
    rounded = cache(lambda: (by.gradient_operand(gradient), by.operand(x)))  # before it is timed, in the first calls
    yield "its weight's, fp8, added in fp32", flops, 0, lambda: by.add_by_weight(total, *rounded())


def _attentions(draw: Callable[..., Tensor], z: Sizes) -> Iterator[Piece]:
    qkv = draw(z.seq, z.batch, z.heads, 3, z.head_dim).requires_grad_()
    upstream = draw(z.batch, z.heads, z.seq, z.head_dim)
    # Two products over half of the window, and twice that backward.
    flops = 3 * 2 * 2 * z.seq * z.batch * z.seq * z.hidden / 2
    for kernel in _KERNELS:
        name = kernel.name.lower().removesuffix("_attention")
        yield f"attention, {name}, forward and backward", flops, 0, partial(_attend, qkv, upstream, kernel)


def _passes(draw: Callable[..., Tensor], z: Sizes, table: Tensor, compiled: bool) -> Iterator[Piece]:
    t, h, f = z.seq * z.batch, z.hidden, z.ffn
    residual, x = draw(z.seq, z.batch, h).requires_grad_(), draw(z.seq, z.batch, h).requires_grad_()
    scale, shift = draw(h).requires_grad_(), draw(h).requires_grad_()

    def norm() -> None:
        _backward(add_norm(residual, x, None, scale, shift, 1e-5, compiled=compiled))

    yield "residual + norm, forward and backward", 0, 2 * t * h * (4 + 4), norm
    both = draw(z.seq, z.batch, 2 * f).requires_grad_()
    yield "swiglu, forward and backward", 0, 2 * t * f * (3 + 5), lambda: _backward(swiglu(both, compiled=compiled))
    qkv = draw(z.seq, z.batch, 3 * h)

    def turn() -> None:
        rotate_in_place(qkv, table, head_dim=z.head_dim, interleaved=True, compiled=compiled)

    yield "rotary, forward", 0, 2 * t * 2 * h * 2 * table.shape[-1] / z.head_dim, turn
    hidden, embedding = draw(t, h).requires_grad_(), draw(z.vocab, h).requires_grad_()
    labels = torch.randint(0, z.vocab, (t,), device=table.device)

    def loss() -> None:
        _backward(cross_entropy(hidden, embedding, labels, scale=0.1, compiled=compiled))

    yield "loss, forward and backward", 6 * t * h * z.vocab, 0, loss
    parameter = torch.nn.Parameter(draw(2 * f, h, dtype=torch.float32))
    parameter.grad = torch.randn_like(parameter)
    yield "AdamW", 0, 28 * parameter.numel(), GroupStepAdamW([parameter]).step


def _attend(qkv: Tensor, upstream: Tensor, kernel: SDPBackend) -> None:
    q, k, v = (each.permute(1, 2, 0, 3) for each in qkv.unbind(3))
    with sdpa_kernel(kernel):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / q.shape[-1])
    out.backward(upstream)
    qkv.grad = None


def _backward(outputs: Any) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, outputs)  # the outputs for their own gradients: any numbers do
