"""Cleaning: ftfy's own result for every text, in a fraction of its time; WikiText's spaces."""

from __future__ import annotations

import json
import sysconfig
import unicodedata
from pathlib import Path

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import NOT_PLAIN, Cleaning, Ftfy, changed_characters, wikitext_detokenize
from data_prep.sources import FaultPolicy, read_documents


def characters() -> str:
    """Of each Unicode category forty, from all over."""
    by_category: dict[str, list[str]] = {}
    for character in map(chr, range(0x110000)):
        by_category.setdefault(unicodedata.category(character), []).append(character)
    return "".join("".join(found[:: max(1, len(found) // 40)]) for found in by_category.values())


# Each of them is mended in another way, or looks as if it were.
AWKWARD = [
    "\u201cq\u201d", "\r\n", "\r", "\n", "&lt;", "&amp;lt;", "&", "&amp", "&#128512;", "<b>", "<", "e\u0301", "\x00",
    "\x0c", "\x1b[31m", "\ufb01", "\uff21", "\uff06amp;", "\uff1c", "\u2028", "\u0085", "\ufeff", "\ud83d\ude00",
    "\ud800", "sÃ³", "âœ”", "voilÃ le", "Ã ", "ãƒ„", "\x93", "Â©", "\u0130", "\u212b", "\u1100\u1161", "日本語、",
    "привет", "naïve", "\xa0", "\t", "ä¸\x80", "вЂ", "x" * 30,
]  # fmt: skip
texts = st.lists(st.text(characters(), max_size=3) | st.sampled_from([*AWKWARD, " ", "word", "\n"]), max_size=14).map(
    "".join
)


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "NFD", None])
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_as_ftfy(normalizer: str | None, text: str) -> None:
    """Planted: entities decoded on every line -> "&lt;" after "<", fails; no second look at what was mended -> a wide
    "&" then "amp;" stays, fails; no test for wrong encodings -> "sÃ³" stays, fails; no normal form -> fails."""
    assert Cleaning(True, normalizer)(text) == ftfy.fix_text(text, normalization=normalizer)


def test_changed_characters() -> None:
    """Every character that ftfy changes is known, by asking ftfy about each."""
    known = set(changed_characters())
    alone = ftfy.TextFixerConfig(unescape_html=False, fix_encoding=False, normalization=None, explain=False)
    size = 1 << 12
    for start in range(0, 0x110000, size):
        rest = "".join(c for c in map(chr, range(start, start + size)) if c not in known)
        assert ftfy.fix_and_explain(rest, alone).text == rest


def test_real_text(shared: Path) -> None:
    clean = Cleaning(use_ftfy=True)
    plain = "".join(map(chr, range(0x20, 0x7F))).replace("&", "") + "\t\n  '\"<b> x"
    assert not NOT_PLAIN.search(plain)
    cases = json.loads((shared / "fixtures/data/text_cases.json").read_text())["old"]["ftfy_fix_text_nfc"]
    for text, expected in cases.items():
        assert clean(json.loads(text)) == expected
        assert Cleaning()(json.loads(text)) == json.loads(text)
    source = shared / "fixtures/data/input/slimpajama/chunk1.jsonl"
    documents = [document.text for document in read_documents(source, FaultPolicy("skip"))]
    sources = [
        path.read_text(errors="replace") for path in Path(sysconfig.get_path("stdlib")).glob("test/test_uni*.py")
    ]
    for text in [plain, *documents, *sources]:
        assert clean(text) == ftfy.fix_text(text, normalization="NFC")


def test_longer_lines_than_ftfy_takes_at_once() -> None:
    """It cuts those at a million characters, wherever that is; at ten here. Planted: not looked for -> fails."""
    mend = Ftfy("NFC")
    mend._configs = {unescapes: config._replace(max_decode_length=10) for unescapes, config in mend._configs.items()}
    for text in ("a" * 7 + "&lt;\n&lt;", "a" * 6 + "&lt;\n&amp;\n", "\n" * 12 + "&lt;<&lt;", "a&lt;\n" * 9 + "<&lt;"):
        assert mend(text) == ftfy.fix_text(text, mend._configs[True])


def test_wikitext() -> None:
    assert wikitext_detokenize(' = = Title = = \n The 1 @,@ 000 " words " , ( he \'s ) .') == (
        ' == Title ==\nThe 1,000 "words", (he\'s) .'
    )
