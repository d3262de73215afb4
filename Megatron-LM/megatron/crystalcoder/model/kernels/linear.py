"""megatron-core's parallel linear layers with their gradient added straight to the fp32 main gradient.

megatron-core can do that with Apex's extension only; without it, each micro-batch writes every weight's gradient, reads
it again to add it, and a bf16 one is rounded on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron.crystalcoder.model.kernels import products


class ColumnLinear(ColumnParallelLinear):
    """Split by outputs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **layout: Any) -> Tensor:
        group = self.tp_group if self.sequence_parallel or layout["allreduce_dgrad"] else None
        return linear(input, weight, bias, group=group, sequence_parallel=layout["sequence_parallel"])


class RowLinear(RowParallelLinear):
    """Split by inputs. Where it is not split at all, the bias is added inside the product."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **layout: Any) -> Tensor:
        return linear(input, weight, bias)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output and the bias that the caller has yet to add."""
        if self.tp_group.size() == 1:
            return linear(input_, self.weight, self.bias), None
        return super().forward(input_)


def linear(
    x: Tensor,
    weight_oi: Tensor,
    bias_o: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """x W^T + b over the last dimension.

    group: the tensor-parallel ranks over which W is split by outputs; the input's gradient is summed over them. With
    sequence_parallel the input is this rank's part of the first dimension, and so is its gradient.
    """
    return _Linear.apply(x, weight_oi, bias_o, group, sequence_parallel)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # An attribute: an in-place change of the main gradient is what backward is for.
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.has_bias, ctx.group, ctx.sequence_parallel = bias is not None, group, sequence_parallel
        whole = _gather(x, group)[0] if sequence_parallel else x
        # `.data`: a tensor of its own and no view in autograd's eyes, so that the next operation may work in place.
        return products.forward(whole, weight, bias).data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathering = None
        if ctx.sequence_parallel and needs_weight:
            x, gathering = _gather(x, ctx.group, wait=False)
        gradient_to = gradient.flatten(0, -2)

        by_x = summing = None
        if needs_x:
            by_x = products.by_input(gradient_to, weight).unflatten(0, gradient.shape[:-1])
            if ctx.sequence_parallel:
                part = by_x.new_empty(by_x.shape[0] // ctx.group.size(), *by_x.shape[1:])
                summing = dist.reduce_scatter_tensor(part, by_x, group=ctx.group, async_op=True)
                by_x, _whole = part, by_x  # read by the collective until it is waited for
            elif ctx.group is not None:
                summing = dist.all_reduce(by_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        by_weight = weight_gradient(weight, ctx.main_grad, gradient_to, x.flatten(0, -2)) if needs_weight else None
        by_bias = gradient_to.sum(0) if ctx.has_bias and needs_bias else None
        if summing is not None:
            summing.wait()
        return by_x, by_weight, by_bias, None, None


def weight_gradient(weight: Tensor, main_grad: Tensor | None, gradient_to: Tensor, x_ti: Tensor) -> Tensor | None:
    """What to hand autograd as `weight`'s gradient: itself, or after adding it to `main_grad` a stand-in.

    megatron-core's data parallelism is told by `grad_added_to_main_grad` not to add the stand-in; it wants a tensor,
    because it takes its arrival for the gradient's. A weight that has another use on this rank as well (a tied
    embedding: `zero_out_wgrad`) gets nothing from here, and the other use's gradient is added as usual.
    """
    if main_grad is None:
        return products.by_weight(gradient_to, x_ti)
    products.add_by_weight(main_grad, gradient_to, x_ti)
    if getattr(weight, "zero_out_wgrad", False):
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _gather(x: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """All ranks' parts along the first dimension; not to be read before the handle, if any, is waited for."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)
    return whole, handle
