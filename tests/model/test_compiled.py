"""The fused passes as a GPU runs them, compiled by torch, here by its C++ backend: same checks, same results."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron.crystalcoder.model.kernels.compiled import maybe_compiled
from megatron.crystalcoder.training.moments import pack, unpack
from tools.bench.kernel_checks import SMALL, run_checks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


def test_every_compiled_pass_against_fp64() -> None:
    from megatron.crystalcoder import platform

    platform.initialize()
    checks = list(run_checks(torch.device("cpu"), SMALL, compiled=True))
    platform.shutdown()
    assert [check for check in checks if not check.passed] == []
    assert {"swiglu", "loss", "rotary", "residual + norm", "linear, fp8"} <= {check.name for check in checks}


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_packing_moments(kind: Any) -> None:
    """The same numbers to the bit; for any number of them from one compilation."""
    seed = torch.tensor(5, dtype=torch.int32)
    packing, unpacking = (maybe_compiled(function, True, any_size=True) for function in (pack, unpack))
    for count in range(1000, 1400, 20):
        values = torch.randn(count) * torch.logspace(-6, 2, count)
        assert torch.equal(unpack(packing(values, kind, seed)), unpack(pack(values, kind, seed)))
        assert torch.equal(unpacking(pack(values, kind, seed)), unpack(pack(values, kind, seed)))


def test_more_shapes_than_torch_allows_by_itself() -> None:
    """In any thread: a GPU's backward pass is not in the one that compiled first. Planted: torch's own limit of 8, at
    which a whole-graph compilation fails, and the limit raised in the first thread alone, fail."""
    double = maybe_compiled(lambda x: x * 2, True)
    double(torch.ones(1))
    with ThreadPoolExecutor(1) as other:
        for size in range(2, 14):
            assert torch.equal(other.submit(double, torch.ones(size)).result(), torch.full((size,), 2.0))
