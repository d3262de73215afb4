"""Tokenise and pack against the plain way: the tokenizer on each document, h5py's gzip. Same documents."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import orjson
from tokenizers import Tokenizer as PlainTokenizer

from data_prep.errors import InputError
from data_prep.tokenize_corpus import TokenizeOptions, tokenize_corpus
from tools.bench.report import Table, interleaved

SEQUENCE, MEGABYTES = 2048, 12


def measure() -> Table:
    """Seconds of each way on this Python's own library, in turn, one process each."""
    tokenizer = _llama_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        size = _write_corpus(corpus)
        ours, plain = Path(folder, "ours"), Path(folder, "plain.h5")
        options = TokenizeOptions(str(tokenizer), SEQUENCE)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        seconds = interleaved(
            {
                "crystalcoder data tokenize": lambda: tokenize_corpus([str(corpus)], ours, options, overwrite=True),
                "tokenizer per document, h5py gzip": lambda: _plain(corpus, tokenizer, plain),
            },
            rounds=2,
        )
        rows = _num_rows(ours.glob("*.h5")), _num_rows([plain])
    base = seconds["tokenizer per document, h5py gzip"]
    return Table(
        "data",
        "Tokenise and pack",
        f"{size / 1e6:.1f} MB of Python source, LLaMA vocabulary, sequences of {SEQUENCE}, one process; best of 2.",
        ("way", "s", "MB / s", "speed-up", "rows"),
        [
            (way, f"{s:.1f}", f"{size / s / 1e6:.2f}", f"{base / s:.1f}", str(count))
            for (way, s), count in zip(seconds.items(), rows, strict=True)
        ],
    )


def _llama_tokenizer() -> Path:
    shared = Path(os.environ.get("CRYSTALCODER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    path = shared / "data/llama_tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: the benchmark needs a LLaMA tokenizer.json: name its folder in CRYSTALCODER_SHARED")
    return path


def _write_corpus(path: Path) -> int:
    """The library's source files as JSON lines, up to MEGABYTES; bytes of text."""
    size = 0
    with path.open("wb") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in source.parts or size > MEGABYTES * 1e6:
                continue
            text = source.read_bytes()
            try:
                file.write(orjson.dumps({"text": text.decode()}) + b"\n")
            except UnicodeDecodeError:
                continue  # a test file of another encoding
            size += len(text)
    return size


def _plain(corpus: Path, tokenizer_file: Path, out: Path) -> None:
    tokenizer = PlainTokenizer.from_file(str(tokenizer_file))
    stream: list[int] = []
    for line in corpus.open("rb"):
        stream += [*tokenizer.encode(orjson.loads(line)["text"]).ids, 2]
    n = (len(stream) - 1) // SEQUENCE
    ids = np.array(stream, np.int32)
    inputs, labels = ids[: n * SEQUENCE].reshape(n, SEQUENCE), ids[1 : n * SEQUENCE + 1].reshape(n, SEQUENCE)
    with h5py.File(out, "w") as file:
        rows = np.stack([inputs, np.ones_like(inputs), labels], axis=1)
        file.create_dataset("data", data=rows, chunks=(1, 3, SEQUENCE), compression="gzip")


def _num_rows(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        with h5py.File(path) as file:
            total += len(file["data"])
    return total
