"""The device seam: the Adam that megatron-core gets, and what stays as it was."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from megatron.crystalcoder import platform
from megatron.crystalcoder.model.config import ParallelConfig


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    platform.initialize()
    platform.initialize_model_parallel(ParallelConfig())
    yield
    platform.shutdown()


@pytest.mark.parametrize(("fused", "scale"), [(True, None), (True, 3.0), (False, None)])
def test_adam_equals_the_formula_in_fp64(fused, scale):
    """Five steps on random gradients against AdamW written out in fp64, to fp32 rounding: in one pass, in one pass with
    the gradients divided by a scale, and operation by operation.

    Right: 6e-7. Planted: decay not multiplied by lr -> 1.1; eps inside the root -> 2e-2; no bias correction -> 3e-1;
    the scale left out -> 7e-1.
    """
    lr, beta1, beta2, eps, decay = 3e-2, 0.9, 0.95, 1e-3, 0.1
    generator = torch.Generator().manual_seed(5)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((17, 5), (5,))]
    optimizer = platform.GroupStepAdamW(
        [{"params": parameters[:1], "weight_decay": decay}, {"params": parameters[1:], "weight_decay": 0.0}],
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
    )
    optimizer.fused = fused
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    expected = [parameter.detach().double() for parameter in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    for step in range(1, 6):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double() / (scale or 1.0)
            m = beta1 * moments[i][0] + (1 - beta1) * gradient
            v = beta2 * moments[i][1] + (1 - beta2) * gradient**2
            moments[i] = (m, v)
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
            expected[i] -= lr * (update + (decay if i == 0 else 0.0) * expected[i])
        optimizer.step()
    for parameter, reference in zip(parameters, expected, strict=True):
        assert (parameter - reference).abs().max() < 1e-6
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]


def test_adam_leaves_out_what_is_not_finite():
    """With `found_inf` nothing changes but the count, which can be taken back: the next step is as if it had not been.

    Planted: the count not taken back -> the next step differs by 9e-2.
    """
    parameters = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    with_it, without = (platform.GroupStepAdamW([parameter], lr=0.1) for parameter in parameters)
    for value, finite in ((1.0, True), (float("nan"), False), (-0.5, True)):
        parameters[0].grad = torch.full((5,), value)
        with_it.found_inf = torch.tensor(float(not finite))
        with_it.step()
        if finite:
            parameters[1].grad = torch.full((5,), value)
            without.step()
        else:
            with_it.take_back_step()
        assert torch.equal(parameters[0], parameters[1])
    assert with_it.param_groups[0]["step"] == 2


def test_adam_state_survives_saving_and_loading():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = platform.GroupStepAdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = deepcopy(optimizer.state_dict())
    copy = torch.nn.Parameter(parameter.detach().clone())
    resumed = platform.GroupStepAdamW([copy])
    resumed.load_state_dict(state)
    copy.grad = parameter.grad = torch.full((3,), 0.5)
    optimizer.step()
    resumed.step()
    assert torch.equal(parameter, copy)
    assert resumed.param_groups[0]["step"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the seam is for machines without CUDA")
def test_cuda_questions_get_cpu_answers():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert platform.device() == torch.device("cpu")
    assert platform.peak_flops() is None
    assert platform.peak_memory_bytes() > 100e6


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", None),
    ],
)
def test_peak_by_name(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None):
    """NVIDIA's dense figures. Planted: the cards of one generation taken for the same, fails."""
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert platform.peak_flops() == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_is_left_alone():
    assert torch.zeros(2, device="cuda").device.type == "cuda"
    assert isinstance(torch.cuda.current_device(), int)


def test_megatron_core_uses_our_adam_where_none_is_installed():
    if platform.adam_class() is not platform.GroupStepAdamW:
        pytest.skip("Transformer Engine or Apex brings its own Adam")
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    assert distributed_optimizer.Adam is platform.GroupStepAdamW
    assert distributed_optimizer.HAVE_APEX_OR_TE
