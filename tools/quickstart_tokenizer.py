"""Train the quickstart's SentencePiece model: LLaMA's settings (BPE, byte fallback, no normalisation), 4,096 pieces."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import sentencepiece
import typer

from data_prep.errors import InputError, exits_on_bad_input

LINE_SHARE = 3  # every third line of the code is enough for 4,096 pieces, and saves the time


def corpus_lines(corpus: Path) -> Iterator[str]:
    """Lines of the corpus's code and prose; SentencePiece reads lines, a newline stays a byte piece as in LLaMA."""
    for path in sorted(corpus.rglob("*.parquet")):
        for text in pq.read_table(path, columns=["content"])["content"].to_pylist():
            yield from text.splitlines()[::LINE_SHARE]
    for path in sorted((corpus / "slimpajama").rglob("*.jsonl")):
        for record in path.read_text("utf-8").splitlines():
            yield from json.loads(record)["text"].splitlines()


def train(corpus: Path, out: Path, vocab_size: int) -> None:
    """Train on `corpus` and write the model to `out`.

    Raises:
        InputError: the corpus is missing or too small for so many pieces.
    """
    lines = [line for line in corpus_lines(corpus) if line.strip() and "\0" not in line]
    if not lines:
        raise InputError(f"{corpus}: holds no text: write the corpus first (python -m tools.quickstart_corpus)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=100_000,
            num_threads=os.cpu_count() or 1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise InputError(f"{corpus}: {vocab_size} pieces cannot be trained on it ({error}): ask for fewer") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, out)


@exits_on_bad_input
def main(
    corpus: Annotated[Path, typer.Argument(help="directory that tools.quickstart_corpus wrote")],
    out: Annotated[Path, typer.Argument(help="the .model file to write")],
    vocab_size: Annotated[int, typer.Option(min=300, help="pieces, bytes and <s> </s> <unk> included")] = 4096,
) -> None:
    """Train a SentencePiece model on the corpus."""
    train(corpus, out, vocab_size)
    print(f"{out}: {vocab_size} pieces")


if __name__ == "__main__":
    typer.run(main)
