"""The cache's ids are the tokenizer's ids, on every kind of character and for every kind of vocabulary."""

from __future__ import annotations

import json
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import piece_cache
from data_prep.piece_cache import Seams, inner_pairs
from data_prep.tokenizer import Tokenizer, load_tokenizer
from support.tiny_tokenizer import TEXT

CATEGORIES = sorted({unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cs"})
# Runs of one Unicode category, glued in any order: every border between two kinds of characters occurs.
runs = st.sampled_from(CATEGORIES).flatmap(lambda c: st.text(st.characters(categories=[c]), min_size=1, max_size=4))
# Words whose pieces hold ASCII and other letters side by side: cut there, they would get other ids.
mixed = ["né", "déjà", "ação", "für", "señor", "année"]
ascii_runs = st.text(st.characters(max_codepoint=127), min_size=1, max_size=6)
words = st.sampled_from([*TEXT.split(" "), *mixed, " ", "  ", "\n"])
texts = st.lists(runs | ascii_runs | words, max_size=14).map("".join)


@pytest.fixture(scope="module")
def llama(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data/llama_tokenizer.json")


def assert_same(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_inside(text).tolist() == tokenizer.encode_uncached(text), text


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_llama(llama: Tokenizer, text: str) -> None:
    """Planted: only pairs with a character beyond ASCII kept together, or none of them -> fails.
    (Random letters seldom make a piece together, hence `mixed`.)"""
    assert_same(llama, text)


@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_tiny(tokenizer: Tokenizer, text: str) -> None:
    assert_same(tokenizer, text)


def test_every_character_beside_every_kind(llama: Tokenizer) -> None:
    """All characters that LLaMA's vocabulary knows, and some of each block, beside each kind of character."""
    known = {character for piece in llama.pieces for character in piece}
    characters = sorted(known | {chr(code) for code in range(0, 0x30000, 37) if not 0xD800 <= code < 0xE000})
    for beside in ("a", "(", "1", " ", "\n", "é", "日"):
        for start in range(0, len(characters), 500):
            assert_same(llama, beside.join(characters[start : start + 500]))


def test_real_text(llama: Tokenizer, shared: Path) -> None:
    """Library source and the fixtures' awkward documents, whole. Planted: the two of `test_llama` -> both fail."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py")):
        assert_same(llama, " " + path.read_text(encoding="utf-8", errors="replace"))
    for line in (shared / "fixtures/data/input/slimpajama/chunk1.jsonl").open(encoding="utf-8"):
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError):
            continue
        assert_same(llama, text)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several=st.lists(texts | st.text("né日", min_size=40, max_size=90), max_size=6))
def test_many_texts_in_blocks(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, block: int, several: list[str]
) -> None:
    """Wherever the blocks end, each text gets its own ids; a word longer than a block stays whole.

    Planted: no seam forced at a text's end -> two texts' words merge, fails; the last word of a block not carried to
    the next -> fails at blocks of 1 and 7.
    """
    monkeypatch.setattr(piece_cache, "BLOCK", block)
    assert [ids.tolist() for ids in tokenizer.encode_all(several)] == [
        tokenizer.encode_uncached(text) for text in several
    ]


def test_a_long_document(llama: Tokenizer) -> None:
    """Three blocks long, with characters of every width, and a word that no block holds."""
    size = piece_cache.BLOCK
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text()
    for filler in (source, source + "naïve 日本🙂 été\n"):
        text = filler * (5 * size // 2 // len(filler))
        ids = llama.encode_inside(text)
        assert llama.decode_inside(ids) == text
        once, thrice = (llama.encode_uncached(filler * n) for n in (1, 3))
        period = (len(thrice) - len(once)) // 2  # the text repeats, so do its ids, whatever block they are in
        assert np.array_equal(ids[: len(once)], once)
        assert np.array_equal(ids[len(once) :], ids[len(once) - period : -period])
    assert llama.encode_inside("x" * (size + 9)).tolist() == llama.encode_uncached("x" * (size + 9))


def test_words_lose_nothing(llama: Tokenizer) -> None:
    seams = Seams.of(llama.inner_pairs)
    text = "".join(map(chr, range(0x3000))).replace("▁", "") * 2 + "  x  \n "
    assert "".join(seams.words(text)) == text
    words = seams.words("def f(x_1): return 12, 'naïve(é)' \n\n  日本a b")
    assert words == ["def", " f", "(", "x", "_", "1", "):", " return", " ", "1", "2", ",", " '", "naïve", "(é)'",
                     " ", "\n", "\n", "  ", "日", "本", "a", " b"]  # fmt: skip
    # What no piece holds beside anything else stands alone.
    assert seams.words("ab🙂\u2028cd\ue000\ue000") == ["ab", "🙂", "\u2028", "cd", "\ue000", "\ue000"]


def test_seams_come_from_the_vocabulary() -> None:
    """Vocabularies whose pieces cross other borders get other words.

    Planted: fixed pairs instead of the vocabulary's -> "get_name" is cut, fails.
    """
    crossing = Seams.of(inner_pairs(["▁get", "t_n", "12", "\n\n"]))
    assert crossing.words("get_name(12)\n\n1") == ["get_name(", "12", ")", "\n\n", "1"]
    alone = Seams.of(inner_pairs(["a", "▁"]))
    assert alone.words("ab, é") == ["a", "b", ",", " ", "é"]
    assert Seams.of(inner_pairs(["in▁the"])) is None  # no seams at spaces: no cache
    assert Seams.of(inner_pairs(["▁▁▁", "▁a"])) is not None


def test_memory_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_cache, "MAX_WORDS", 10)
    monkeypatch.setattr(piece_cache, "MAX_LENGTH", 5)
    generator = np.random.default_rng(0)
    for _ in range(50):
        assert_same(tokenizer, "".join(generator.choice(list("abcdef (1\n"), 200)))
    assert len(tokenizer._cache._known) < 300
