"""Every fused piece of the training step against its formula in fp64: outputs and gradients, on any device.

The sizes are chosen by the caller; a GPU picks other kernels for large tensors than for the tests' small ones.

Shape letters: s sequence, b micro-batch, t tokens, h hidden, n heads, d head dim, f ffn, v vocab.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.crystalcoder.model.kernels.fp8 import Fp8Products
from megatron.crystalcoder.model.kernels.linear import linear
from megatron.crystalcoder.model.kernels.loss import cross_entropy
from megatron.crystalcoder.model.kernels.norm import add_norm
from megatron.crystalcoder.model.kernels.products import cuda_adds_to_fp32
from megatron.crystalcoder.model.kernels.rotary import rotate_in_place
from megatron.crystalcoder.model.kernels.swiglu import swiglu
from megatron.crystalcoder.platform import GroupStepAdamW
from tools.bench.report import one_line

# Relative error (L2, whole tensor) that rounding explains; a mistake is at least some percent.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """h = heads * head_dim; batch sequences of seq tokens."""

    seq: int = 1024
    batch: int = 2
    heads: int = 32
    head_dim: int = 128
    ffn: int = 11008
    vocab: int = 32032

    @property
    def hidden(self) -> int:
        """h."""
        return self.heads * self.head_dim


SMALL = Sizes(seq=24, batch=2, heads=3, head_dim=16, ffn=64, vocab=96)


@dataclass(frozen=True)
class Check:
    """How far one piece was from its formula, in the worst of its outputs and gradients; or why it did not run."""

    name: str
    dtype: str
    error: float
    tolerance: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """A NaN fails."""
        return self.error < self.tolerance


@dataclass(frozen=True)
class _Case:
    """`run` in the checked dtype, `formula` in fp64, on `inputs`; `gradients` compares those of all inputs too."""

    name: str
    run: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: list[Tensor]
    gradients: bool = True
    tolerance: float | None = None


def run_checks(device: torch.device, sizes: Sizes, *, compiled: bool, seed: int = 0) -> Iterator[Check]:
    """All pieces in bf16 and fp32, compiled or not; fp8 products in bf16, emulated without a GPU."""
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator(device).manual_seed(seed)
        for case in _cases(device, dtype, sizes, generator, compiled):
            error, failure = math.nan, ""
            try:
                error = _error(case, dtype)
            except Exception as fault:  # noqa: BLE001 - the others are worth knowing all the same
                traceback.print_exc()
                failure = one_line(fault)
            name = str(dtype).removeprefix("torch.")
            yield Check(case.name, name, error, case.tolerance or TOLERANCE[dtype], failure)


def _error(case: _Case, dtype: torch.dtype) -> float:
    rounded = [x.to(dtype) for x in case.inputs]
    mine = [x.clone().requires_grad_(case.gradients) for x in rounded]
    exact = [x.double().requires_grad_(case.gradients) for x in rounded]
    # Some pieces work in place: what they get is a product's output, no leaf.
    outputs, expected = case.run(*(x * 1 for x in mine)), case.formula(*exact)
    outputs, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, expected))
    pairs = list(zip(outputs, expected, strict=True))
    if case.gradients:
        upstream = [torch.randn_like(out) for out in outputs]
        torch.autograd.backward(outputs, upstream)
        torch.autograd.backward(expected, [u.double() for u in upstream])
        pairs += [(x.grad, true.grad) for x, true in zip(mine, exact, strict=True)]
    return max(relative_error(got, true) for got, true in pairs)


@torch.no_grad()
def relative_error(got: Tensor, true: Tensor) -> float:
    """L2 norm of the difference over that of `true`."""
    true = true.double()
    return float((got.double() - true).norm() / true.norm().clamp(min=1e-300))


def _cases(
    device: torch.device, dtype: torch.dtype, z: Sizes, generator: torch.Generator, compiled: bool
) -> Iterator[_Case]:
    on_gpu = device.type == "cuda"

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    heads = [draw(z.batch, z.heads, z.seq, z.head_dim) for _ in range(3)]
    yield _Case("attention", lambda q, k, v: _fused_attention(q, k, v, 1 / z.head_dim), _attention, heads)

    x, h = draw(z.seq, z.batch, z.hidden), z.hidden
    yield _Case(
        "residual + norm",
        lambda residual, x, bias, weight, shift: add_norm(residual, x, bias, weight, shift, 1e-5, compiled=compiled),
        _add_norm,
        [x, draw(z.seq, z.batch, h), draw(h), draw(h), draw(h)],
    )
    yield _Case("swiglu", lambda x: swiglu(x, compiled=compiled), _swiglu, [draw(z.seq, z.batch, 2 * z.ffn, scale=2)])

    table = rotary_table(z, device).to(dtype)
    yield _Case(
        "rotary",
        lambda qkv: rotate_in_place(qkv, table, head_dim=z.head_dim, interleaved=True, compiled=compiled) * 1,
        lambda qkv: _rotary(qkv, table.double(), z.head_dim),
        [draw(z.seq, z.batch, 3 * h)],
    )

    tokens = z.seq * z.batch
    labels = torch.randint(0, z.vocab, (tokens,), generator=generator, device=device)
    yield _Case(
        "loss",
        lambda hidden, weight: cross_entropy(hidden, weight, labels, scale=0.2, compiled=compiled),
        lambda hidden, weight: torch.nn.functional.cross_entropy(hidden @ weight.T * 0.2, labels, reduction="none"),
        [draw(tokens, h), draw(z.vocab, h, scale=h**-0.5)],
    )

    weight, gradient = draw(z.ffn, h, scale=h**-0.5), draw(z.seq, z.batch, z.ffn)
    yield _Case("linear", linear, torch.nn.functional.linear, [x, weight, draw(z.ffn)])
    if dtype == torch.bfloat16:
        by = Fp8Products(emulated=not on_gpu, compiled=compiled)
        # Rounding to e4m3 and e5m2 is 2.6% and 5.2% in the mean square; a wrong scale, a factor.
        inputs = [x, weight, draw(z.ffn)]
        yield _Case("linear, fp8", lambda *of: linear(*of, by=by), torch.nn.functional.linear, inputs, tolerance=0.08)
    before = draw(z.ffn, h)  # fp32, as main gradients are, whatever dtype is checked
    yield _Case(
        "weight gradient, added",
        lambda x, weight, gradient: _main_gradient(x, weight, gradient, before),
        lambda x, weight, gradient: before.double() + gradient.flatten(0, 1).T @ x.flatten(0, 1),
        [x, weight, gradient],
        gradients=False,
        # A GPU sums the product in fp32 from the start; rounded to bf16 first it is 1.6e-3 off.
        tolerance=1e-4 if on_gpu and cuda_adds_to_fp32() else None,
    )
    if dtype == torch.float32:
        yield _Case("AdamW", _fused_adamw, _adamw, [draw(z.ffn, h), *(draw(z.ffn, h) for _ in range(3))], False)


def _fused_attention(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_bnsd, k_bnsd, v_bnsd, is_causal=True, scale=scale)


def _attention(q_bnsd: Tensor, k_bnsd: Tensor, v_bnsd: Tensor) -> Tensor:
    s, d = q_bnsd.shape[2:]
    future = torch.ones(s, s, dtype=torch.bool, device=q_bnsd.device).triu(1)
    return (q_bnsd @ k_bnsd.transpose(2, 3) / d).masked_fill(future, float("-inf")).softmax(-1) @ v_bnsd


def _add_norm(residual: Tensor, x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x + bias
    variance, mean = torch.var_mean(total, dim=-1, keepdim=True, unbiased=False)
    return total, (total - mean) / torch.sqrt(variance + 1e-5) * weight + shift


def _swiglu(x: Tensor) -> Tensor:
    gate, linear_half = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * linear_half


def rotary_table(z: Sizes, device: torch.device) -> Tensor:
    """[cosines, sines] of each position for the first quarter of a head's dims, fp32 (s, 1, 1, r)."""
    r = z.head_dim // 4
    angles = torch.arange(z.seq)[:, None] * 10000.0 ** (-torch.arange(0, r, 2) / r)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None, None].to(device)


def _rotary(qkv: Tensor, table: Tensor, d: int) -> Tensor:
    """Neighbouring dims as complex numbers, times e^(i angle)."""
    r = table.shape[-1]
    heads = qkv.unflatten(-1, (-1, 3, d))
    turning = torch.complex(*table[:, :, :, None].chunk(2, dim=-1))
    pairs = torch.view_as_complex(heads[..., :2, :r].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turning).flatten(-2)
    q_and_k = torch.cat([turned, heads[..., :2, r:]], dim=-1)
    return torch.cat([q_and_k, heads[..., 2:, :]], dim=-2).reshape(qkv.shape)


def _main_gradient(x: Tensor, weight: Tensor, gradient: Tensor, before: Tensor) -> Tensor:
    parameter: Any = torch.nn.Parameter(weight)
    parameter.main_grad, parameter.grad_added_to_main_grad = before.clone(), False
    linear(x, parameter).backward(gradient)
    return parameter.main_grad


_LR, _BETAS, _EPS, _DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def _fused_adamw(weight: Tensor, *gradients: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = GroupStepAdamW([parameter], _LR, _BETAS, _EPS, _DECAY)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def _adamw(weight: Tensor, *gradients: Tensor) -> Tensor:
    beta1, beta2 = _BETAS
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + _EPS)
        weight = weight - _LR * (update + _DECAY * weight)
    return weight
