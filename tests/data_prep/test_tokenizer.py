"""Tokenising is exact, and no text becomes a control token."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from data_prep.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_once
from support.tiny_tokenizer import TEXT

AWKWARD = [
    "", " ", "  a", "a ", "\n", "\r\n", "\t x", "</s>", "<s>", "a </s> b", "<unk>", "<|fim_prefix|>", "<0x0A>", "▁"[:0],
    "日本語", "🙂🙂", "e\u0301", "\x00", "\u2028", "\ufeff", " " * 50, "x" * 300, "    return x\n\n\n",
]  # fmt: skip
texts = st.text(max_size=60) | st.lists(st.sampled_from([*TEXT.split(" "), *AWKWARD]), max_size=20).map(" ".join)
texts = texts.map(lambda text: text.encode(errors="ignore").decode())


@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_decode_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert not set(ids) & set(tokenizer.controls.values())


@settings(max_examples=60, deadline=None)
@given(left=texts, right=texts)
def test_parts_join(tokenizer: Tokenizer, left: str, right: str) -> None:
    """Planted: a dummy space in encode_inside -> " 0" for "0", fails."""
    ids = tokenizer.encode(left) + list(tokenizer.encode_inside(right))
    assert tokenizer.decode_inside(ids) == ((" " if left else "") + left + right).replace("▁", " ")


def test_reference_ids(shared: Path) -> None:
    """The reference's ids of 30 awkward texts, but for names of control tokens, which stay text here."""
    tokenizer = load_tokenizer(shared / "data/llama_tokenizer.json")
    cases = json.loads((shared / "fixtures/data/text_cases.json").read_text())["old"]["tok"]
    for text, case in cases.items():
        expected = case["ids_no_special"]
        if not {0, 1, 2} & set(expected):
            assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    fim = tokenizer.fim_ids
    assert (fim.prefix, fim.middle, fim.suffix, fim.pad) == (32000, 32001, 32002, 32003)
    crystal = load_tokenizer(shared / "data/crystalcoder_tokenizer.json")
    assert crystal.fim_ids == fim
    assert crystal.token_id("<|im_start|>") == 32018
    assert crystal.encode(TEXT) == tokenizer.encode(TEXT)


def test_names_of_control_tokens_stay_text(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    """Planted: leaving the added tokens in the matcher -> "<unk>" in a text becomes id 0, fails."""
    for name in tokenizer.controls:
        for text in (name, f"a {name} b", f"a{name}"):
            assert not set(tokenizer.encode(text)) & set(tokenizer.controls.values())
            assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = Backend.from_file(str(tokenizer_file))
    assert plain.encode("</s>", add_special_tokens=False).ids == [2]  # what would happen
    assert tokenizer.encode("<0x41>") != [tokenizer.pieces.index("<0x41>")]


def test_pickle_and_fim_ids_by_name(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.fim_ids.suffix == tokenizer.pieces.index("<|fim_suffix|>")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_model(tmp_path: Path, kind: str) -> None:
    import sentencepiece

    (tmp_path / "text").write_text(TEXT * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t"), model_type=kind, vocab_size=330,
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
        user_defined_symbols=["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"], minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert tokenizer.fim_ids.prefix == plain.piece_to_id("<fim_prefix>")
    for text in [*AWKWARD, *TEXT.splitlines(), TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if "<" not in text:
            assert tokenizer.encode(text) == plain.encode(text)
        assert not set(tokenizer.encode(text)) & set(tokenizer.controls.values())


def test_a_relative_path_is_another_file_elsewhere(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: remembered by the path as given -> the first folder's tokenizer is used in the second, fails."""
    definition = json.loads(tokenizer_file.read_text())
    for folder, merges in (("a", definition["model"]["merges"]), ("b", [])):
        definition["model"]["merges"] = merges
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(definition))
    lengths = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        lengths.append(len(load_tokenizer_once("tokenizer.json").encode("first second")))
    assert lengths[0] < lengths[1]
