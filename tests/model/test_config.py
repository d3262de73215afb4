"""Sizes and muP constants: the 7B numbers, and layouts that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, MuP
from support.reference_model import TINY, random_weights

SEVEN_B = ModelConfig(
    vocab_size=32032,
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    ffn_hidden_size=10922,
    rotary_dim=32,
    mup=MuP(width_scale=0.0625, output_alpha=2.22, embeddings_scale=14.6, scale_qk_dot_by_d=True),
)


def test_7b_has_the_published_numbers():
    assert SEVEN_B.num_parameters == 6_575_278_720
    assert SEVEN_B.rotary_percent == 0.25
    assert SEVEN_B.softmax_scale == 1 / 128
    assert SEVEN_B.mup.output_scale == pytest.approx(0.13875, rel=1e-12)


def test_parameter_count_is_that_of_the_tensors():
    assert TINY.num_parameters == sum(tensor.numel() for tensor in random_weights(TINY, seed=0).values())


def test_scores_are_scaled_by_sqrt_d_without_mup():
    assert replace(SEVEN_B, mup=MuP()).softmax_scale == 128**-0.5


@pytest.mark.parametrize("tensor_parallel", [4, 8])
def test_7b_does_not_split_four_ways(tensor_parallel: int):
    with pytest.raises(InputError, match=r"does not divide the ffn hidden size \(10922\): use one of 1, 2$"):
        SEVEN_B.check_layout(tensor_parallel, 1)


def test_heads_and_layers_must_divide():
    with pytest.raises(InputError, match="does not divide the attention heads"):
        TINY.check_layout(3, 1)
    with pytest.raises(InputError, match="does not divide the 4 layers"):
        TINY.check_layout(1, 3)
    with pytest.raises(InputError, match="not divisible by 5 attention heads"):
        replace(TINY, num_attention_heads=5)
    with pytest.raises(InputError, match="rotary dim 5 must be even"):
        replace(TINY, rotary_dim=5)
