"""The gradient as the optimizer sees it: its norm, and which parameter's is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron.crystalcoder import platform
from megatron.crystalcoder.training.optimizer import parameter_names

# Squares that are summed in fp32, in a vector's lanes, before fp64 takes over: an error of 1e-8.
_ROW = 4096


def gradient_norms(optimizer: MegatronOptimizer) -> Tensor:
    """L2 norm of each gradient that this rank counts, fp64 (n,), in the order of `counted_parameters`.

    torch's fp32 norm of millions of elements is off by 1e-5 to 1e-4 on a CPU, and clipping follows it. Its fp64 norm
    of an fp32 tensor takes a tenth of the whole step there.
    """
    gradients = [parameter.grad for parameter in counted_parameters(optimizer)]
    if not gradients:
        return torch.zeros(0, dtype=torch.float64, device=platform.device())
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, 2, torch.float64))
    return torch.stack([_square_sum(gradient.reshape(-1)) for gradient in gradients]).sqrt()


def _square_sum(x: Tensor) -> Tensor:
    rows = len(x) // _ROW * _ROW
    rest = torch.linalg.vector_norm(x[rows:], dtype=torch.float64).square()
    return rest + torch.linalg.vector_norm(x[:rows].view(-1, _ROW), dim=1).double().square().sum()


def total_norm(norms: Tensor, optimizer: MegatronOptimizer) -> Tensor:
    """L2 norm of the whole model's gradient, fp64 (), each parameter counted once whatever the layout."""
    total = norms.square().sum()
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return total.sqrt()


def non_finite_parameter(model: torch.nn.Module, optimizer: MegatronOptimizer, norms: Tensor) -> str | None:
    """The first parameter of the model whose gradient is not finite on this rank, or None."""
    finite = torch.isfinite(norms).tolist()
    names = parameter_names(model, optimizer)
    bad = {
        names[id(parameter)] for parameter, good in zip(counted_parameters(optimizer), finite, strict=True) if not good
    }
    ordered = (name.removeprefix("module.") for name, _ in model.named_parameters())
    return next((name for name in ordered if name in bad), None)


def counted_parameters(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """What the optimizer updates and this rank counts: whole parameters or its shards, no copy of another rank's."""
    inner: Any = optimizer
    for single in inner.chained_optimizers:
        for parameter in single.get_parameters():
            mine = param_is_not_tensor_parallel_duplicate(parameter, getattr(single, "tp_group", None))
            if parameter.grad is not None and param_is_not_shared(parameter) and mine:
                yield parameter
