"""A small tokenizer in LLaMA's style with the CrystalCoder control tokens, trained on the project's own source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import SYSTEM_END, SYSTEM_START, USER_END, USER_START


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """tokenizer.json: BPE with byte fallback, `▁` before each text, control tokens last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # As in LLaMA's vocabulary, no piece holds a space behind another character. For the training only.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    text = [line for path in sorted((repo_root / "finetune").glob("*.py")) for line in path.read_text().splitlines()]
    # Without the lines that spell control tokens: their pieces could merge into one, which LLaMA's never do.
    lines = [line for line in text if "<s" not in line and "</s" not in line and "<|" not in line]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (USER_START, USER_END, SYSTEM_START, SYSTEM_END)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    definition = {**json.loads(tokenizer.to_str()), "pre_tokenizer": None}
    # The trainer takes the byte pieces as special tokens; to the format they are ordinary pieces of the vocabulary.
    definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(definition))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path):
    return load_tokenizer(tokenizer_file)
