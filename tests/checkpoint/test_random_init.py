"""Initial weights: the right distribution per tensor, and the same numbers at any layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.checkpoint.weights import rank_state_dict
from megatron.crystalcoder.model.config import ModelConfig, MuP
from megatron.crystalcoder.model.initialization import InitSettings, Normal, Uniform
from megatron.crystalcoder.training.params import load_params

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


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_statistics_of_the_7b_files(repo_root: Path, phase: int) -> None:
    """Every kind of weight as the phase's YAML says, at its width 4096 (two layers, a cut vocabulary): mean, spread and
    bounds within sampling error, query, key and value apart. Planted: sigma times 1.002, fails (0.2 % of spread)."""
    small = ["model.num_hidden_layers=2", "model.vocab_size=1024", "model.filter_size=512"]
    small += [f"{section}.vocab_size=1024" for section in ("train_input", "eval_input")]
    params = load_params(repo_root / f"params/phase{phase}/params.yaml", small)
    weights = RandomWeights(params.model_config(), params.init_settings(), params.init_seed)
    for name, std in {
        "transformer.wte.weight": 0.073,
        "transformer.h.1.attn.c_attn.weight": 0.01825,
        "transformer.h.1.mlp.c_fc.weight": 0.01825,
        "transformer.h.1.mlp.c_fc2.weight": 0.01825,
        "transformer.h.1.attn.c_proj.weight": 0.00228125,
        "transformer.h.1.mlp.c_proj.weight": 0.00228125,
    }.items():
        for x in weights.read(name).double().split(4096, dim=-1):
            assert x.abs().max() <= 2 * std * (1 + 1e-6)
            assert abs(x.mean()) < 5 * CUT * std / math.sqrt(x.numel()), name
            # The spread of a cut normal's spread: its kurtosis is 2.06 (a normal's is 3).
            assert abs(x.std() / (CUT * std) - 1) < 5 * math.sqrt(1.06 / 4 / x.numel()), name


def test_the_references_gate_is_an_option() -> None:
    """Uniform within 1 / sqrt(128) where asked for, and nowhere else: std 1 / sqrt(3 * 128), 0.0510 (at width 64 the
    reference's own is 0.0738 of 0.0722). Planted: the bound of the ffn size's root; the linear branch's bias: fail."""
    bound = CONFIG.hidden_size**-0.5
    bias, weight = "transformer.h.1.mlp.c_fc2.bias", "transformer.h.1.mlp.c_fc2.weight"
    plain = RandomWeights(CONFIG, TRUNCATED, seed=1)
    biased = RandomWeights(CONFIG, replace(TRUNCATED, gate_bias=Uniform(bound)), seed=1)
    both = RandomWeights(CONFIG, replace(TRUNCATED, gate_bias=Uniform(bound), gate=Uniform(bound)), seed=1)
    for source, names in ((biased, (bias,)), (both, (bias, weight))):
        for name in names:
            x = source.read(name)
            assert x.abs().max() <= bound
            assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / math.sqrt(x.numel()))
            assert x.abs().max() > 0.98 * bound
        changed = {n for n in plain.names() if not torch.equal(plain.read(n), source.read(n))}
        assert changed == {n for n in plain.names() if any(n.endswith(name[17:]) for name in names)}


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
