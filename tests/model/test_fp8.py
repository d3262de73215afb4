"""fp8 linear layers: their numbers against fp64, the whole model against bf16, a loss curve on real text, and refusals.

On a machine without fp8 products they are emulated: fp32 products of operands rounded to the same formats.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.fusions import Speed, parse_fusions
from megatron.crystalcoder.model.kernels.fp8 import E4M3, E5M2, Fp8Products, check_fp8
from megatron.crystalcoder.training.config import DataSettings, WarmupDecay
from megatron.crystalcoder.training.loop import check_sizes
from support.distributed import run_on_ranks
from support.text_runs import curve, text_rows, train_on
from support.training_runs import column, tiny_config

# e4m3 rounds by up to 1/16, e5m2 by up to 1/8 of a number; of normal ones by 2.6% and 5.2% in the mean square.
ROUNDING = {E4M3: 0.026, E5M2: 0.052}
EMULATED = Speed(fp8="emulated")


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_products_are_as_exact_as_their_formats(dtype: torch.dtype, size: float) -> None:
    """At any size of the numbers. Planted: a scale left out of a product, gradients in e4m3, fail."""
    from megatron.crystalcoder.model.kernels.linear import linear

    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((16, 4, 96), (48, 96), (48,)))
    parameters = [x.mul(size).requires_grad_(), weight.requires_grad_(), bias.mul(size).requires_grad_()]
    out = linear(*parameters, by=Fp8Products(emulated=True))
    upstream = torch.randn(out.shape).to(dtype)
    out.backward(upstream)
    x64, weight64, bias64, upstream64 = (each.detach().double() for each in (*parameters, upstream))
    gradients = [
        upstream64 @ weight64,
        upstream64.flatten(0, 1).T @ x64.flatten(0, 1),
        upstream64.sum((0, 1)),
    ]
    forward = 2**0.5 * ROUNDING[E4M3]
    backward = (ROUNDING[E4M3] ** 2 + ROUNDING[E5M2] ** 2) ** 0.5
    expected = [(out, x64 @ weight64.T + bias64, forward)]
    expected += [
        (cast(torch.Tensor, each.grad), true, backward) for each, true in zip(parameters, gradients, strict=True)
    ]
    for got, true, rounding in expected[:3]:
        assert got.dtype == dtype
        assert 0.5 * rounding < error(got, true) < 1.2 * rounding
    assert error(expected[3][0], expected[3][1]) < 0.01  # the bias sees no fp8


def test_emulation_equals_the_scaled_product() -> None:
    """Where torch has scaled products for this device: the same numbers, but for the order of the sums."""
    a, b = torch.randn(32, 64), torch.randn(48, 64)
    one = torch.ones(())
    try:
        torch._scaled_mm(a.to(E4M3), b.to(E4M3).t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    except RuntimeError:
        pytest.skip("this torch has no scaled products on this device")
    real, emulated = Fp8Products(), Fp8Products(emulated=True)
    for name in ("forward", "by_input", "by_weight"):
        results = []
        for products in (real, emulated):
            if name == "forward":
                results.append(products.forward(products.operand(a), b, torch.arange(48.0)))
            elif name == "by_input":
                results.append(products.by_input(products.gradient_operand(a @ b.t()), b))
            else:
                gradient = products.gradient_operand(a[:, :48])
                results.append(products.by_weight(gradient, products.operand(a)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_numbers_without_a_size() -> None:
    """Zeros stay zeros, and a NaN is not rounded away: the step is then left out as without fp8."""
    products = Fp8Products(emulated=True)
    weight = torch.randn(32, 16)
    assert not products.forward(products.operand(torch.zeros(16, 16)), weight).any()
    spoilt = torch.randn(16, 16)
    spoilt[3, 4] = float("nan")
    assert products.forward(products.operand(spoilt), weight).isnan().any()


def test_a_model_learns_as_in_bf16(tmp_path: Path, repo_root: Path) -> None:
    """Planted: the input's gradient times 2, fails."""
    path, size = text_rows(tmp_path / "text.h5", repo_root), {"global_batch_size": 4, "micro_batch_size": 4}
    schedule = WarmupDecay(3e-3, 3e-3, 0, 1, "constant")
    plain = curve(path, tmp_path / "bf16", 8, schedule=schedule, **size)
    fp8 = curve(path, tmp_path / "fp8", 8, schedule=schedule, speed=EMULATED, **size)
    assert plain[-1] < plain[0] - 0.5
    assert 1e-4 < np.abs(fp8 - plain).max() < 0.1  # another arithmetic, the same model


@pytest.mark.slow
def test_the_same_over_ranks(tmp_path: Path, repo_root: Path) -> None:
    """TP 2 with sequence parallelism, where a scale is that of a rank's part."""
    path = text_rows(tmp_path / "text.h5", repo_root)
    fp8 = curve(path, tmp_path / "fp8", 20, speed=EMULATED)
    split = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    run_on_ranks(2, train_split, path, tmp_path / "split", split, EMULATED)
    np.testing.assert_allclose(column(tmp_path / "split", "lm_loss"), fp8, atol=0.15)


def train_split(path: Path, save: Path, parallel: ParallelConfig, speed: Speed) -> None:
    """What each rank runs."""
    train_on(path, save, 20, parallel, speed=speed)


@pytest.mark.slow
def test_loss_over_200_steps_on_real_text_is_within_the_noise(tmp_path: Path, repo_root: Path) -> None:
    """The noise is how far the ends of bf16 runs lie apart that differ in nothing but the order of their rows."""
    path = text_rows(tmp_path / "text.h5", repo_root)
    ends = np.array([_ends(path, tmp_path / str(seed), seed) for seed in range(1, 5)])
    bf16, fp8 = ends.T
    print(f"bf16 {bf16}, fp8 {fp8}, mean difference {(fp8 - bf16).mean():.4f}, noise {bf16.std(ddof=1):.4f}")
    assert abs((fp8 - bf16).mean()) < bf16.std(ddof=1)


def _ends(path: Path, folder: Path, seed: int) -> tuple[float, float]:
    """The mean of the last 50 losses in bf16 and in fp8, over the same rows."""
    data = DataSettings(paths=(path,), order="shuffled", seed=seed)
    plain = curve(path, folder / "bf16", 200, data=data)
    fp8 = curve(path, folder / "fp8", 200, data=data, speed=EMULATED)
    assert plain[-50:].mean() < plain[0] - 2
    return float(plain[-50:].mean()), float(fp8[-50:].mean())


def test_refusals() -> None:
    with pytest.raises(InputError, match="--fp8 needs the fusion wgrad"):
        Speed(parse_fusions("all,-wgrad"), fp8="on")
    sizes = {"FFN hidden size": 172}
    with pytest.raises(InputError, match="the FFN hidden size of one rank, 172, is not a multiple of 16"):
        check_fp8(emulated=True, sizes=sizes)
    config = tiny_config(Path(), speed=EMULATED)
    check_sizes(replace(config, micro_batch_size=1, global_batch_size=1), ranks=1)
    tokens = f"1 x {config.seq_length - 1} = {config.seq_length - 1} tokens is not a multiple of 16"
    with pytest.raises(InputError, match=tokens):
        check_sizes(replace(config, seq_length=config.seq_length - 1, micro_batch_size=1, global_batch_size=1), ranks=1)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--fp8 on: this machine has no GPU with fp8 products"):
            check_fp8(emulated=False, sizes={})
