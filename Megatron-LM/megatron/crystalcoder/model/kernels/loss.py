"""Cross-entropy of a (tied, muP-scaled) output layer by chunks of tokens.

    loss = log(sum_v exp(c h.E_v)) - c h.E_label

The fp32 logits of one chunk exist at a time; between the passes stay the logits in the model's dtype, or, with
`keep_logits` off, nothing but one number per token: they are then computed again. Over tensor-parallel ranks each has
its part of the vocabulary, and two all-reduces of one number per token join them.

Shape letters: t tokens, h hidden, v this rank's vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.crystalcoder.model.kernels import products
from megatron.crystalcoder.model.kernels.compiled import maybe_compiled
from megatron.crystalcoder.model.kernels.linear import weight_gradient


def cross_entropy(
    hidden_th: Tensor,
    weight_vh: Tensor,
    labels_t: Tensor,
    *,
    scale: float,
    group: dist.ProcessGroup | None = None,
    chunk: int = 0,
    keep_logits: bool = True,
    compiled: bool = False,
) -> Tensor:
    """Each token's loss, fp32 (t,).

    hidden: the same on all ranks of `group`; its gradient here is this rank's share, to be summed over the group.
    labels: over the whole vocabulary, of which the ranks of `group` hold equal parts in order. chunk: tokens; 0: as
    many as suit the device.
    """
    keeps = keep_logits and torch.is_grad_enabled()
    return _CrossEntropy.apply(
        hidden_th, weight_vh, labels_t, scale, group, chunk or _chunk_for(weight_vh), keeps, compiled
    )


def _chunk_for(weight_vh: Tensor) -> int:
    """Tokens whose fp32 logits stay in a CPU's cache, or fill a GPU."""
    return 2048 if weight_vh.is_cuda else max(64, (8 << 20) // (4 * weight_vh.shape[0]))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: float,
        group: dist.ProcessGroup | None,
        chunk: int,
        keep_logits: bool,
        compiled: bool,
    ) -> Tensor:
        local = labels if group is None else labels - group.rank() * weight.shape[0]
        statistics = maybe_compiled(_statistics, compiled)
        kept: list[Tensor] = []
        parts = []
        for start in range(0, len(hidden), chunk):
            logits = products.forward(hidden[start : start + chunk], weight)
            parts.append(statistics(logits, local[start : start + chunk], scale))
            if keep_logits:
                kept.append(logits)
        log_sum, target = (torch.cat(each) for each in zip(*parts, strict=True))
        if group is not None and group.size() > 1:
            largest = log_sum.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(log_sum - largest).exp(), target])
            dist.all_reduce(sums, group=group)
            log_sum, target = largest + sums[0].log(), sums[1]
        ctx.save_for_backward(hidden, weight, local, log_sum)
        ctx.parameter, ctx.main_grad = weight, getattr(weight, "main_grad", None)  # as in linear.py
        ctx.kept, ctx.scale, ctx.chunk, ctx.compiled = kept, scale, chunk, compiled
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, weight, local, log_sum = ctx.saved_tensors
        by_logits = maybe_compiled(_gradient, ctx.compiled) if ctx.compiled else _gradient_in_place
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = None
        for number, start in enumerate(range(0, len(hidden), ctx.chunk)):
            here = slice(start, start + ctx.chunk)
            logits = ctx.kept[number] if ctx.kept else None
            if logits is None:
                logits = products.forward(hidden[here], weight)
            else:
                ctx.kept[number] = None
            by_chunk = by_logits(logits, log_sum[here], local[here], gradient[here], ctx.scale)
            if by_hidden is not None:
                by_hidden[here] = products.by_input(by_chunk, weight)
            if ctx.needs_input_grad[1]:
                added = weight_gradient(ctx.parameter, ctx.main_grad, by_chunk, hidden[here])
                if by_weight is None or added is None or ctx.main_grad is not None:
                    by_weight = added
                else:
                    by_weight += added
        return by_hidden, by_weight, None, None, None, None, None, None


def _statistics(logits_tv: Tensor, labels_t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """log(sum(exp)) of the scaled logits, and that of the label, 0 where this rank does not have it; both fp32 (t,)."""
    scaled = logits_tv.float() * scale
    vocabulary = logits_tv.shape[1]
    mine = (labels_t >= 0) & (labels_t < vocabulary)
    target = logits_tv.gather(1, labels_t.clamp(0, vocabulary - 1)[:, None])[:, 0].float() * scale
    return torch.logsumexp(scaled, dim=1), torch.where(mine, target, 0.0)


def _gradient(logits_tv: Tensor, log_sum_t: Tensor, labels_t: Tensor, gradient_t: Tensor, scale: float) -> Tensor:
    """(softmax - one_hot(label)) * scale * gradient, in the logits' dtype."""
    softmax = (logits_tv.float() * scale - log_sum_t[:, None]).exp()
    is_label = torch.arange(logits_tv.shape[1], device=logits_tv.device) == labels_t[:, None]
    return ((softmax - is_label.float()) * (gradient_t * scale)[:, None]).to(logits_tv.dtype)


def _gradient_in_place(
    logits_tv: Tensor, log_sum_t: Tensor, labels_t: Tensor, gradient_t: Tensor, scale: float
) -> Tensor:
    """`_gradient` without a compiler: as few passes as torch's operations allow, over the logits' own memory."""
    work = logits_tv if logits_tv.dtype == torch.float32 else logits_tv.float()
    factor = gradient_t * scale
    torch.add(-log_sum_t[:, None], work, alpha=scale, out=work).exp_().mul_(factor[:, None])
    vocabulary = logits_tv.shape[1]
    mine = (labels_t >= 0) & (labels_t < vocabulary)
    subtracted = torch.where(mine, factor, 0.0)
    work.scatter_add_(1, labels_t.clamp(0, vocabulary - 1)[:, None], -subtracted[:, None])
    return work.to(logits_tv.dtype)
