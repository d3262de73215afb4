"""How a new model's weights are drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig


@dataclass(frozen=True)
class Normal:
    """A normal distribution with mean 0, cut at [a, b] when they are given.

    `std` is that of the normal before it is cut: at two sigmas the cut makes the drawn values' std 0.88 of it.
    """

    std: float
    a: float | None = None
    b: float | None = None

    @classmethod
    def truncated(cls, std: float, sigmas: float = 2.0) -> Normal:
        """Cut at `sigmas` standard deviations on both sides."""
        return cls(std, -sigmas * std, sigmas * std)


@dataclass(frozen=True)
class InitSettings:
    """Which distribution each kind of weight is drawn from. Biases start at 0, LayerNorm at weight 1 and bias 0.

    embedding: the word embedding. hidden: q, k, v and both input matrices of the MLP. output: the matrices that write
    into the residual stream (attention output, MLP output). head: an untied output layer.
    (The pretraining reference leaves the gate's bias at torch's uniform default by oversight; here it is 0 as well.)
    """

    embedding: Normal
    hidden: Normal
    output: Normal
    head: Normal = Normal(0.02)

    @classmethod
    def for_hf(cls, config: ModelConfig, initializer_range: float = 0.02) -> InitSettings:
        """The Hugging Face model's muP initialisation: std * sqrt(width scale), outputs also / sqrt(2 * layers)."""
        hidden = initializer_range * config.mup.width_scale**0.5
        return cls(
            embedding=Normal(initializer_range),
            hidden=Normal(hidden),
            output=Normal(hidden / (2 * config.num_layers) ** 0.5),
            head=Normal(initializer_range),
        )


def initial_tensor(name: str, shape: tuple[int, ...], init: InitSettings, seed: int) -> Tensor:
    """The initial fp32 value of one tensor, by its Hugging Face name; a function of (name, shape, init, seed) alone."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".ln_" in name:
        return torch.ones(shape)
    if name == "transformer.wte.weight":
        normal = init.embedding
    elif name == "lm_head.weight":
        normal = init.head
    else:
        normal = init.output if name.endswith(".c_proj.weight") else init.hidden
    # A hash, not a running generator: neither the order of drawing nor the split over ranks changes a weight.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    if normal.a is None or normal.b is None:
        return torch.empty(shape).normal_(0.0, normal.std, generator=generator)
    return _truncated_normal(shape, normal.std, normal.a, normal.b, generator)


def _truncated_normal(shape: tuple[int, ...], std: float, a: float, b: float, generator: torch.Generator) -> Tensor:
    """Inverse CDF: a uniform number between Phi(a) and Phi(b), turned back into a normal one, clamped to [a, b]."""
    low, high = (torch.special.ndtr(torch.tensor(x / std, dtype=torch.float64)).item() for x in (a, b))
    # fp64 while drawing: fp32 would quantise the tails.
    uniform = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)
    return torch.special.ndtri(uniform).mul_(std).clamp_(a, b).float()
