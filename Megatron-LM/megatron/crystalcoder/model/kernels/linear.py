"""megatron-core's parallel linear layers with their gradient added straight to the fp32 main gradient.

megatron-core can do that with Apex's extension only; without it, each micro-batch writes every weight's gradient, reads
it again to add it, and a bf16 one is rounded on the way. With fp8 on, the products are those of `fp8`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.kernels import products
from megatron.crystalcoder.model.kernels.fp8 import Fp8Products, Fp8Tensor

Products = Any  # the module `products`, or an Fp8Products
Operand = Any  # what its `operand` and `gradient_operand` make of a tensor: itself, or an Fp8Tensor


def products_for(speed: Speed) -> Products:
    """The products of the linear layers inside the blocks."""
    if speed.fp8 == "off":
        return products
    return Fp8Products(emulated=speed.fp8 == "emulated", compiled=speed.compiles_ops)


class ColumnLinear(ColumnParallelLinear):
    """Split by outputs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **layout: Any) -> Tensor:
        group = self.tp_group if self.sequence_parallel or layout["allreduce_dgrad"] else None
        by = products_for(self.config.speed)
        return linear(input, weight, bias, group=group, sequence_parallel=layout["sequence_parallel"], by=by)


class RowLinear(RowParallelLinear):
    """Split by inputs. Where it is not split at all, the bias is added inside the product."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **layout: Any) -> Tensor:
        return linear(input, weight, bias, by=products_for(self.config.speed))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output and the bias that the caller has yet to add."""
        if self.tp_group.size() == 1:
            return linear(input_, self.weight, self.bias, by=products_for(self.config.speed)), None
        return super().forward(input_)


def linear(
    x: Tensor,
    weight_oi: Tensor,
    bias_o: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    by: Products = products,
) -> Tensor:
    """x W^T + b over the last dimension, computed by the functions of `by`.

    group: the tensor-parallel ranks over which W is split by outputs; the input's gradient is summed over them. With
    sequence_parallel the input is this rank's part of the first dimension, and so is its gradient.
    """
    return _Linear.apply(x, weight_oi, bias_o, group, sequence_parallel, by)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        by: Products,
    ) -> Tensor:
        operand = by.operand(_gather(x, group)[0] if sequence_parallel else x)
        # Of a gathered input, this rank's part is kept, and gathered again.
        kept = x if sequence_parallel else operand
        ctx.save_for_backward(weight, *(kept if isinstance(kept, Fp8Tensor) else (kept,)))
        # Attributes: an in-place change of the main gradient is what backward is for, and of a saved weight comes back,
        # through hooks such as those of offloading, another tensor than the parameter that data parallelism knows.
        ctx.parameter, ctx.main_grad = weight, getattr(weight, "main_grad", None)
        ctx.has_bias, ctx.group, ctx.sequence_parallel, ctx.by = bias is not None, group, sequence_parallel, by
        # `.data`: a tensor of its own and no view in autograd's eyes, so that the next operation may work in place.
        return by.forward(operand, weight, bias).data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        operand: Operand = Fp8Tensor(*kept) if len(kept) > 1 else kept[0]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathering = None
        if ctx.sequence_parallel and needs_weight:
            whole, gathering = _gather(operand, ctx.group, wait=False)
        gradient_to = gradient.flatten(0, -2)
        by_gradient = ctx.by.gradient_operand(gradient_to)

        by_x = summing = None
        if needs_x:
            by_x = ctx.by.by_input(by_gradient, weight).unflatten(0, gradient.shape[:-1])
            if ctx.sequence_parallel:
                part = by_x.new_empty(by_x.shape[0] // ctx.group.size(), *by_x.shape[1:])
                summing = dist.reduce_scatter_tensor(part, by_x, group=ctx.group, async_op=True)
                by_x, _whole = part, by_x  # read by the collective until it is waited for
            elif ctx.group is not None:
                summing = dist.all_reduce(by_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
            operand = ctx.by.operand(whole)
        by_weight = None
        if needs_weight:
            by_weight = weight_gradient(ctx.parameter, ctx.main_grad, by_gradient, operand, ctx.by)
        by_bias = gradient_to.sum(0) if ctx.has_bias and needs_bias else None
        if summing is not None:
            summing.wait()
        return by_x, by_weight, by_bias, None, None, None


def weight_gradient(
    weight: Tensor, main_grad: Tensor | None, gradient: Operand, x: Operand, by: Products = products
) -> Tensor | None:
    """What to hand autograd as `weight`'s gradient: itself, or after adding it to `main_grad` a stand-in.

    megatron-core's data parallelism is told by `grad_added_to_main_grad` not to add the stand-in; it wants a tensor,
    because it takes its arrival for the gradient's. A weight that has another use on this rank as well (a tied
    embedding: `zero_out_wgrad`) gets nothing from here, and the other use's gradient is added as usual.
    """
    if main_grad is None:
        return by.by_weight(gradient, x).to(weight.dtype)
    by.add_by_weight(main_grad, gradient, x)
    if getattr(weight, "zero_out_wgrad", False):
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _gather(x: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """All ranks' parts along the first dimension; not to be read before the handle, if any, is waited for."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=not wait)
    return whole, handle
