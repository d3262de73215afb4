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
class Uniform:
    """Every value between -bound and bound alike: torch's default for a linear layer, with bound 1 / sqrt(inputs)."""

    bound: float


@dataclass(frozen=True)
class InitSettings:
    """Which distribution each kind of weight is drawn from. Biases start at 0, LayerNorm at weight 1 and bias 0.

    embedding: the word embedding. hidden: q, k, v and both input matrices of the MLP. output: the matrices that write
    into the residual stream (attention output, MLP output). head: an untied output layer.
    gate_bias, gate: what the pretraining reference leaves at torch's default, by oversight: the bias of the MLP's gate,
    and without `scale_glu_initialization` its weight. Without them they are as every other bias and hidden weight.
    """

    embedding: Normal
    hidden: Normal
    output: Normal
    head: Normal = Normal(0.02)
    gate_bias: Uniform | None = None
    gate: Uniform | None = None

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
    distribution = _distribution(name, init)
    if distribution is None:
        return torch.ones(shape) if ".ln_" in name and name.endswith(".weight") else torch.zeros(shape)
    # A hash, not a running generator: neither the order of drawing nor the split over ranks changes a weight.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    if isinstance(distribution, Uniform):
        return torch.empty(shape).uniform_(-distribution.bound, distribution.bound, generator=generator)
    if distribution.a is None or distribution.b is None:
        return torch.empty(shape).normal_(0.0, distribution.std, generator=generator)
    return _truncated_normal(shape, distribution.std, distribution.a, distribution.b, generator)


def _distribution(name: str, init: InitSettings) -> Normal | Uniform | None:
    """What the tensor of this Hugging Face name is drawn from; None: it starts at a constant."""
    if name.endswith(".mlp.c_fc2.bias"):
        return init.gate_bias
    if name.endswith(".bias") or ".ln_" in name:
        return None
    if name == "transformer.wte.weight":
        return init.embedding
    if name == "lm_head.weight":
        return init.head
    if name.endswith(".c_proj.weight"):
        return init.output
    return init.gate if init.gate and name.endswith(".mlp.c_fc2.weight") else init.hidden


def _truncated_normal(shape: tuple[int, ...], std: float, a: float, b: float, generator: torch.Generator) -> Tensor:
    """Inverse CDF: a uniform number between Phi(a) and Phi(b), turned back into a normal one, clamped to [a, b]."""
    low, high = (torch.special.ndtr(torch.tensor(x / std, dtype=torch.float64)).item() for x in (a, b))
    # fp64 while drawing: fp32 would quantise the tails.
    uniform = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)
    return torch.special.ndtri(uniform).mul_(std).clamp_(a, b).float()
