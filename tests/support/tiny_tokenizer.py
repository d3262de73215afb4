"""A small tokenizer of the LLaMA kind, made here, so that the tests need nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, models, normalizers, trainers
from tokenizers import Tokenizer as Backend

from data_prep.tokenizer import CODE_TOKENS

TEXT = """def add(first, second):
    \"\"\"Return the sum of first and second.\"\"\"
    return first + second


for index in range(10):
    print("the number is", add(index, 1))
class Person:
    def __init__(self, name): self.name = name
The quick brown fox jumps over the lazy dog, and then the dog sleeps for the rest of the day. é ü ß
"""


def write_tiny_tokenizer(path: Path) -> None:
    """A BPE tokenizer.json with byte fallback, 600 pieces, and the code tokens behind them."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    controls = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=controls, show_progress=False)
    # Line by line and cut before spaces, as a SentencePiece trainer would see it.
    words = [word for line in TEXT.splitlines() for word in line.replace(" ", "\n ").split("\n")]
    backend.train_from_iterator(words * 4, trainer)
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] < 3]
    backend = Backend.from_str(json.dumps(definition))
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in CODE_TOKENS])
    backend.save(str(path))
