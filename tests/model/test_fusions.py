"""Every fused piece against its formula in fp64, and the whole model with each fusion against the plain path.

Inputs are new at every run; a failure names its seed. Planted once each and caught: the rotation not turned back, the
gate's and the linear half's gradients swapped, the bias gradient left out of add_norm, the loss's scale left out of its
gradient, one chunk's weight gradient overwriting the others', a stand-in added to the main gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.fusions import FUSIONS, Speed, parse_fusions
from megatron.crystalcoder.training.config import DataSettings, TrainConfig, WarmupDecay
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.training_runs import tiny_weights

# Relative error of the whole tensor (L2): rounding is 1e-7 in fp32 and 4e-3 in bf16, a mistake at least some percent.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    print("seed", generator.seed())  # pytest shows it with a failure
    return generator


def agree(got: Tensor, expected: Tensor, dtype: torch.dtype, what: object = "") -> None:
    """Within rounding of `dtype`, over the whole tensor."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"{what}: off by {error:.2e}"


def compare(fused: Callable[..., Any], formula: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs and all inputs' gradients of `fused` in `dtype` against `formula` in fp64 at the same rounded inputs."""
    rounded = [x.to(dtype) for x in inputs]
    mine = [x.clone().requires_grad_() for x in rounded]
    exact = [x.double().requires_grad_() for x in rounded]
    # A product's output comes before every fused piece: something that is no leaf, as one works in place.
    outputs = fused(*(x * 1 for x in mine))
    expected = formula(*exact)
    outputs, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, expected))
    upstream = [
        torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(x.numel())) for x in expected
    ]
    upstream = [u.to(out.dtype) for u, out in zip(upstream, outputs, strict=True)]
    for number, (out, true) in enumerate(zip(outputs, expected, strict=True)):
        agree(out.detach(), true.detach(), dtype, f"output {number}")
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, [u.double() for u in upstream])
    for number, (x, true) in enumerate(zip(mine, exact, strict=True)):
        agree(cast(Tensor, x.grad), cast(Tensor, true.grad), dtype, f"gradient {number}")


@DTYPES
def test_attention(generator: torch.Generator, dtype: torch.dtype) -> None:
    from megatron.crystalcoder.model.attention import plain_attention

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / 8)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(2, 3)) / 8
        return scores.masked_fill(~torch.ones(24, 24).tril().bool(), float("-inf")).softmax(-1) @ v

    qkv = [torch.randn(2, 3, 24, 8, generator=generator) for _ in range(3)]
    compare(fused, formula, qkv, dtype)
    compare(lambda q, k, v: plain_attention(q, k, v, 1 / 8), formula, qkv, dtype)


@DTYPES
def test_swiglu(generator: torch.Generator, dtype: torch.dtype) -> None:
    from megatron.crystalcoder.model.kernels.swiglu import swiglu

    def formula(x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * linear

    compare(swiglu, formula, [torch.randn(5, 2, 34, generator=generator) * 2], dtype)


@DTYPES
@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
def test_rotary(generator: torch.Generator, dtype: torch.dtype, interleaved: bool) -> None:
    from megatron.crystalcoder.model.kernels.rotary import rotate_in_place

    s, n, d, r = 9, 3, 10, 6
    angles = torch.arange(s)[:, None] * 100.0 ** (-torch.arange(0, r, 2) / r)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None, None].to(dtype)

    def formula(qkv: Tensor) -> Tensor:
        x = qkv.view(s, 2, n, 3, d)
        cos, sin = table.double()[:, :, :, None].chunk(2, dim=-1)
        first = x[..., 0:r:2] if interleaved else x[..., : r // 2]
        second = x[..., 1:r:2] if interleaved else x[..., r // 2 : r]
        turned = x.clone()
        ones, twos = first * cos - second * sin, second * cos + first * sin
        for which in (0, 1):  # q and k
            if interleaved:
                turned[..., which, 0:r:2], turned[..., which, 1:r:2] = ones[..., which, :], twos[..., which, :]
            else:
                turned[..., which, : r // 2], turned[..., which, r // 2 : r] = ones[..., which, :], twos[..., which, :]
        return turned.view_as(qkv)

    def fused(qkv: Tensor) -> Tensor:
        return rotate_in_place(qkv, table, head_dim=d, interleaved=interleaved) * 1

    compare(fused, formula, [torch.randn(s, 2, n * 3 * d, generator=generator)], dtype)


@DTYPES
@pytest.mark.parametrize("with_bias", [True, False])
def test_add_norm(generator: torch.Generator, dtype: torch.dtype, with_bias: bool) -> None:
    from megatron.crystalcoder.model.kernels.norm import add_norm

    def formula(residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x + sum(bias)
        variance, mean = torch.var_mean(total, dim=-1, keepdim=True, unbiased=False)
        return total, (total - mean) / torch.sqrt(variance + 1e-3) * weight + shift

    def fused(residual: Tensor, x: Tensor, weight: Tensor, shift: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(residual, x, bias[0] if bias else None, weight, shift, 1e-3)

    shapes = [(7, 2, 48), (7, 2, 48), (48,), (48,)] + [(48,)] * with_bias
    compare(fused, formula, [torch.randn(shape, generator=generator) for shape in shapes], dtype)


@DTYPES
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("chunk", [0, 3])
def test_loss(generator: torch.Generator, dtype: torch.dtype, keep: bool, chunk: int) -> None:
    from megatron.crystalcoder.model.kernels.loss import cross_entropy

    labels = torch.randint(0, 50, (11,), generator=generator)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(hidden, weight, labels, scale=0.4, chunk=chunk, keep_logits=keep)

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T * 0.4, labels, reduction="none")

    compare(fused, formula, [torch.randn(11, 16, generator=generator), torch.randn(50, 16, generator=generator)], dtype)


@DTYPES
def test_linear_adds_to_the_main_gradient(generator: torch.Generator, dtype: torch.dtype) -> None:
    from megatron.crystalcoder.model.kernels.linear import linear

    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 2, 24), (40, 24), (40,)))
    compare(linear, torch.nn.functional.linear, [x, weight, bias], dtype)

    parameter: Any = torch.nn.Parameter(weight.to(dtype))
    before = torch.randn(40, 24, generator=generator)
    parameter.main_grad, parameter.grad_added_to_main_grad = before.clone(), False
    upstream = torch.randn(5, 2, 40, generator=generator).to(dtype)
    linear(x.to(dtype), parameter, bias.to(dtype)).backward(upstream)
    product = upstream.double().flatten(0, 1).T @ x.to(dtype).double().flatten(0, 1)
    agree(parameter.main_grad, before.double() + product, dtype)
    assert parameter.grad_added_to_main_grad


# ---- the whole model ----

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)
TP2_DP2 = ParallelConfig(tensor_model_parallel_size=2, overlap_grad_reduce=True)
SINGLE_RANK = ParallelConfig()


def gradients(parallel: ParallelConfig, speeds: dict[str, Speed], bf16: bool) -> dict[str, Any]:
    """On this rank: the losses and main gradients of two accumulated micro-batches with each of `speeds`."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import forward_backward

    platform.initialize()
    platform.initialize_model_parallel(parallel)
    found = {}
    for name, speed in speeds.items():
        config = TrainConfig(
            model=TINY,
            data=DataSettings(),
            schedule=WarmupDecay(1e-3, 1e-3, 0, 1, "constant"),
            train_iters=1,
            micro_batch_size=2,
            global_batch_size=4,
            seq_length=32,
            parallel=parallel,
            bf16=bf16,
            speed=speed,
        )
        model, _ = build(config, Start("test", cast(Any, tiny_weights())))
        model.zero_grad_buffer()
        losses = forward_backward(model, batches(), [64.0, 64.0], config)
        grads = {key: cast(Any, p).main_grad.clone() for key, p in model.module.named_parameters()}
        found[name] = (losses, grads)
    return found


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(21)
    tokens = torch.randint(0, TINY.vocab_size, (2, 2, 33), generator=generator)
    mask = (torch.rand(2, 2, 32, generator=generator) < 0.8).float()
    positions = torch.arange(32).expand(2, 32)
    return [
        {"tokens": t[:, :-1], "labels": t[:, 1:], "position_ids": positions, "loss_mask": m}
        for t, m in zip(tokens, mask, strict=True)
    ]


SPEEDS = {"plain": Speed(frozenset()), **{name: Speed(frozenset({name})) for name in FUSIONS}, "all": Speed()}


def check(found: dict[str, Any], tolerance: float) -> None:
    losses, grads = found["plain"]
    for name, (other_losses, other_grads) in found.items():
        torch.testing.assert_close(other_losses, losses, rtol=tolerance, atol=0)
        assert other_grads.keys() == grads.keys()
        for key, grad in grads.items():
            # Against the largest gradient of its kind: a key's bias has none but rounding, and none is expected.
            scale = grad.norm() + 1e-4 * max(g.norm() / g.numel() ** 0.5 for g in grads.values()) * grad.numel() ** 0.5
            error = (other_grads[key] - grad).norm() / scale
            assert error < tolerance, f"{name}: gradient of {key} off by {error:.1e}"


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 2e-5), (True, 0.04)], ids=["fp32", "bf16"])
def test_each_fusion_equals_the_plain_model(bf16: bool, tolerance: float) -> None:
    from megatron.crystalcoder import platform

    found = gradients(SINGLE_RANK, SPEEDS, bf16)
    platform.shutdown()
    check(found, tolerance)


@pytest.mark.parametrize("parallel", [TP2_PP2, TP2_DP2], ids=["TP2 PP2 SP", "TP2 DP2 overlapped"])
def test_each_fusion_equals_the_plain_model_over_ranks(parallel: ParallelConfig) -> None:
    for found in run_on_ranks(4, gradients, parallel, SPEEDS, False):
        check(found, 2e-5)


def test_what_a_gpu_compiles_is_right_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that torch.compile is given, uncompiled. Planted: the labels' places subtracted as booleans, which
    torch refuses but some of its compilers let pass."""
    from megatron.crystalcoder.model.kernels import compiled
    from tools.bench.kernel_checks import SMALL, run_checks

    monkeypatch.setattr(compiled, "_compiled", lambda function, any_size: function)
    checks = list(run_checks(torch.device("cpu"), SMALL, compiled=True))
    assert [check for check in checks if not check.passed] == []


def test_names_of_fusions() -> None:
    assert parse_fusions("all") == frozenset(FUSIONS)
    assert parse_fusions("none") == frozenset()
    assert parse_fusions("norm, swiglu") == {"norm", "swiglu"}
    assert parse_fusions("all,-loss") == frozenset(FUSIONS) - {"loss"}
    with pytest.raises(InputError, match="unknown fusion 'nrom'"):
        parse_fusions("nrom")
    with pytest.raises(InputError, match="unknown fusion 'x'"):
        Speed(frozenset({"x"}))
