"""A small SentencePiece model of the LLaMA kind, trained in a second on Python's own source."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import sentencepiece

NUM_PIECES = 700


def train_sentencepiece(path: Path) -> Path:
    """Train `NUM_PIECES` pieces with LLaMA's settings and write them to `path` (a .model file)."""
    lines = (Path(argparse.__file__).read_text() + Path(inspect.__file__).read_text()).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line),
        model_prefix=str(path.with_suffix("")),
        vocab_size=NUM_PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    return path
