"""Fixtures of the data_prep tests."""

from __future__ import annotations

from pathlib import Path

import pytest

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
