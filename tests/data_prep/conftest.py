"""Fixtures of the data_prep tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors

from data_prep.tokenizer import Tokenizer, load_tokenizer
from support.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 600 pieces and the code tokens behind them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def template_tokenizer(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tokenizer, with BOS put in front and a decoder, as LLaMA's file has them."""
    backend = Backend.from_file(str(tokenizer_file))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    path = tmp_path_factory.mktemp("template") / "tokenizer.json"
    backend.save(str(path))
    return path
