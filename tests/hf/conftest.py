"""Models that the tests of the Hugging Face side share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel
from CrystalCoder.build_tokenizer import build_tokenizer
from support.reference_model import TINY, random_weights
from support.sentencepiece_model import train_sentencepiece


@pytest.fixture(scope="session")
def hf_tiny(shared: Path) -> Path:
    """The reference's tiny checkpoint: four .bin shards with buffers and a separate head."""
    return shared / "fixtures/hf_tiny"


@pytest.fixture
def own_config() -> CrystalCoderConfig:
    """The Hugging Face side of `TINY`: every muP constant away from 1, a quarter of each head turned by rotary."""
    return CrystalCoderConfig(
        vocab_size=TINY.vocab_size,
        n_positions=TINY.max_sequence_length,
        n_embd=TINY.hidden_size,
        n_layer=TINY.num_layers,
        n_head=TINY.num_attention_heads,
        n_inner=TINY.ffn_hidden_size,
        rotary_dim=TINY.rotary_dim,
        mup_width_scale=TINY.mup.width_scale,
        mup_output_alpha=TINY.mup.output_alpha,
        mup_embeddings_scale=TINY.mup.embeddings_scale,
    )


@pytest.fixture
def own_model(own_config: CrystalCoderConfig) -> Any:
    """`TINY` with random weights, large biases and norms included, so that every part of it moves the logits."""
    model = CrystalCoderLMHeadModel(own_config).eval()
    loaded = model.load_state_dict(random_weights(TINY, seed=1), strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == ["lm_head.weight"]
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids (3, 40) of `TINY`'s vocabulary, none of them a special one."""
    return torch.randint(3, TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 700 pieces, trained on Python source as LLaMA's was on its corpus."""
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture(scope="session")
def own_tokenizer(sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CrystalCoder's tokenizer made from it: 722 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert build_tokenizer(sentencepiece_model, folder) == 722
    return AutoTokenizer.from_pretrained(folder)
