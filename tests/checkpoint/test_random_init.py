"""Initial weights: the right distribution per tensor, and the same numbers at any layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.checkpoint.weights import rank_state_dict
from megatron.crystalcoder.model.config import ModelConfig, MuP
from megatron.crystalcoder.model.initialization import InitSettings, Normal

CONFIG = ModelConfig(512, 128, 4, 4, 342, 8, mup=MuP(width_scale=0.25))
TRUNCATED = InitSettings(Normal.truncated(0.073), Normal.truncated(0.01825), Normal.truncated(0.00228125))
# Standard deviation of a unit normal cut at two sigmas: sqrt(1 - 2*2*phi(2) / (Phi(2) - Phi(-2))).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("transformer.wte.weight", 0.073),
        ("transformer.h.1.attn.c_attn.weight", 0.01825),
        ("transformer.h.1.mlp.c_fc.weight", 0.01825),
        ("transformer.h.1.mlp.c_fc2.weight", 0.01825),
        ("transformer.h.1.attn.c_proj.weight", 0.00228125),
        ("transformer.h.1.mlp.c_proj.weight", 0.00228125),
    ],
)
def test_truncated_normal(name: str, std: float) -> None:
    """Bounds, spread (0.88 of `std`), and the shape: the distribution function of a cut normal.

    Planted: a clamp instead of a cut puts 4.5% of the values on the bounds and misses the spread by 9%.
    """
    x = RandomWeights(CONFIG, TRUNCATED, seed=1).read(name).flatten().double() / std
    assert x.dtype == torch.float64
    assert x.abs().max() <= 2 + 1e-6
    n = x.numel()
    assert (x.abs() >= 2 - 1e-6).sum() <= 2
    assert x.std().item() == pytest.approx(CUT, rel=5 / math.sqrt(2 * n))
    assert abs(x.mean()) < 5 * CUT / math.sqrt(n)
    below = (torch.special.ndtr(x.sort().values) - torch.special.ndtr(torch.tensor(-2.0))) / math.erf(math.sqrt(2))
    assert (below - (torch.arange(n) + 0.5) / n).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov


def test_biases_and_norms() -> None:
    weights = RandomWeights(CONFIG, TRUNCATED, seed=1)
    for name in weights.names():
        if name.endswith(".bias"):
            assert not weights.read(name).any(), name  # the gate's too
        elif ".ln_" in name:
            assert (weights.read(name) == 1).all(), name


def test_hugging_face_mup_initialisation() -> None:
    """0.02 for the embedding, 0.02 * sqrt(1/4) inside, another / sqrt(2 * 4 layers) into the residual stream."""
    weights = RandomWeights(CONFIG, InitSettings.for_hf(CONFIG), seed=1)
    for name, std in {
        "transformer.wte.weight": 0.02,
        "transformer.h.0.mlp.c_fc.weight": 0.01,
        "transformer.h.0.attn.c_attn.weight": 0.01,
        "transformer.h.0.mlp.c_proj.weight": 0.01 / math.sqrt(8),
        "transformer.h.0.attn.c_proj.weight": 0.01 / math.sqrt(8),
    }.items():
        x = weights.read(name)
        assert x.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * x.numel())), name


def test_a_function_of_seed_and_name_alone() -> None:
    """Order of reading, layout and number of layers change no tensor; the seed and the name change every one."""
    one, other = RandomWeights(CONFIG, TRUNCATED, seed=1), RandomWeights(CONFIG, TRUNCATED, seed=2)
    name = "transformer.h.3.mlp.c_fc.weight"
    first = one.read(name)
    for _ in one.names():
        one.read(_)
    assert torch.equal(one.read(name), first)
    assert not torch.equal(other.read(name), first)
    assert not torch.equal(one.read("transformer.h.2.mlp.c_fc.weight"), first)
    layouts = [rank_state_dict(one, CONFIG, tp_rank=t, tp_size=2, pp_rank=1, pp_size=2) for t in range(2)]
    halves = [x["decoder.layers.1.mlp.linear_fc1.weight"][171:] for x in layouts]  # the linear branch lies below
    assert torch.equal(torch.cat(halves).T, first)
