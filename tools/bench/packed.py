"""Packed rows of real text for the benchmarks of the steps on rows."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path

from tools.bench import corpus
from tools.bench.process import cost

MEGABYTES = {"code": 25, "prose": 10}
SEQUENCE = 2048
TEXT = (
    f"{MEGABYTES['code']} MB of installed Python sources and {MEGABYTES['prose']} MB of their documentation, LLaMA "
    f"vocabulary, rows of {SEQUENCE}"
)


def pack(folder: Path) -> float:
    """Fill `folder` with sequence files; megabytes of text in them."""
    texts = folder.with_name(folder.name + "_texts")
    sizes = [
        corpus.write_jsonl(documents, texts / name, MEGABYTES[name])
        for name, documents in (("code", corpus.code()), ("prose", corpus.prose()))
    ]
    cost("tools.cli", "data", "tokenize", str(texts), "--out", str(folder), "--tokenizer", str(corpus.tokenizer_file()),
         "--max-seq-length", str(SEQUENCE), "--shard-mb", "2")  # fmt: skip
    shutil.rmtree(texts)
    (folder / "manifest.json").unlink()
    return sum(sizes) / 1e6


def repeat(folder: Path, times: int) -> None:
    """The files of `folder` so many times over, as links."""
    files = sorted(folder.glob("*.h5"))
    for copy, file in chain.from_iterable(((copy, file) for file in files) for copy in range(1, times)):
        file.with_name(f"{file.stem}_{copy}.h5").symlink_to(file)
