"""Changes to a text before it is tokenised: ftfy's repairs and WikiText's detokenisation. Off unless asked for.

The reference runs ftfy on everything, code too, where it also changes quotes, entities, line ends and control
characters; its configurations say so, so the door that reads them does it as well. ftfy mends one line at a time and
takes its time; `Ftfy` gives it only the lines that it might change.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_prep.errors import InputError

# A line of these characters only is left alone by every repair of ftfy: nothing to decode, unescape, uncurl, widen,
# normalise or strip.
NOT_PLAIN = re.compile(r"[^\t\n\x20-\x25\x27-\x7e]")
NOT_PLAIN_BUT_AND = re.compile(r"[^\t\n\x20-\x7e]")
# What ftfy changes together with its neighbours: terminal escapes, halves of surrogate pairs.
NOT_ALONE = re.compile("[\x1b\ud800-\udfff]")

NORMAL_FORMS = ("NFC", "NFKC", "NFD", "NFKD")  # of ftfy's last repair

# WikiText's spaces around marks, as language-model pipelines since GPT-NeoX undo them, in this order.
WIKITEXT_PAIRS = (
    [("s '", "s'")],
    [(f" @{mark}@ ", mark) for mark in "-,."] + [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"],
    [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
     (" N ", " 1 "), (" 's", "'s")],
)  # fmt: skip
WIKITEXT_QUOTED_DIGIT = re.compile(r"/' [0-9]/")
WIKITEXT_BRACKETS = [
    (re.compile(rf"\{left}\s*([^\{right}]*?)\s*\{right}"), rf"{left}\1{right}")
    for left, right in ("()", "[]", "{}", '""', "''")
]


def normal_form(option: str, value: str | None) -> str | None:
    """A normal form by name; None for "none", which leaves the text in the form that it has.

    Raises:
        InputError: no such form; `option` is what it was given with.
    """
    if value is None or value.lower() == "none":
        return None
    if value not in NORMAL_FORMS:
        raise InputError(f"{option} {value}: use one of {', '.join(NORMAL_FORMS)}, none")
    return value


@dataclass(frozen=True)
class Cleaning:
    """Which changes are made: none by default."""

    use_ftfy: bool = False
    ftfy_normalizer: str | None = "NFC"
    wikitext_detokenize: bool = False

    def __call__(self, text: str) -> str:
        """The text after the changes."""
        if self.use_ftfy:
            text = _ftfy(self.ftfy_normalizer)(text)
        return wikitext_detokenize(text) if self.wikitext_detokenize else text


class Ftfy:
    """`ftfy.fix_text` with its default settings and this normal form, faster.

    ftfy works on one line at a time. Only this goes from one line to the next: it decodes HTML entities up to the first
    line with `<`. Its other repairs change characters one by one, wrong encodings apart; and it repeats all of them
    until nothing changes. So a line without entities in which its own test finds no trace of a wrong encoding is done
    when its characters are exchanged and it is in the normal form, if then all of that still holds.
    """

    def __init__(self, normalizer: Any) -> None:
        import ftfy
        from ftfy.badness import is_bad

        self._fix_text, self._fix_line = ftfy.fix_text, ftfy.fix_and_explain
        self._looks_bad = lambda line: not line.isascii() and is_bad(line)
        self._entity = ftfy.chardata.HTML_ENTITY_RE.search
        self._normalizer = normalizer
        before = ftfy.TextFixerConfig(normalization=normalizer, explain=False)
        self._configs = {False: before._replace(unescape_html=False), True: before}
        alone = before._replace(unescape_html=False, fix_encoding=False, normalization=None)
        characters = changed_characters()
        self._exchanged = str.maketrans({c: ftfy.fix_and_explain(c, alone).text for c in characters})
        self._touched = re.compile(f"[{''.join(map(re.escape, characters))}]").search

    def __call__(self, text: str) -> str:
        """The text after ftfy's repairs."""
        found = NOT_PLAIN.search(text)
        if not found:
            return text
        config = self._configs[True]
        if len(text) > config.max_decode_length and max(map(len, text.split("\n"))) >= config.max_decode_length:
            return self._fix_text(text, config)  # it cuts such lines
        parts, done = [], 0
        markup = text.find("<")
        if markup < 0:
            markup = len(text)
        while found:
            start = text.rfind("\n", done, found.start()) + 1 or done
            end = text.find("\n", found.start()) + 1 or len(text)
            line = text[start:end]
            mended = self._mend(line, end <= markup)
            if mended is not line:
                parts += [text[done:start], mended]
                done = end
            found = (NOT_PLAIN if end <= markup else NOT_PLAIN_BUT_AND).search(text, end)
        return "".join([*parts, text[done:]])

    def _mend(self, line: str, unescapes: bool) -> str:
        if not (unescapes and self._entity(line)) and not self._looks_bad(line) and not NOT_ALONE.search(line):
            mended = line.replace("\r\n", "\n").translate(self._exchanged) if self._touched(line) else line
            if self._normalizer and not unicodedata.is_normalized(self._normalizer, mended):
                mended = unicodedata.normalize(self._normalizer, mended)
            if mended is line or not (
                (unescapes and self._entity(mended)) or self._looks_bad(mended) or self._touched(mended)
            ):
                return mended
        return self._fix_line(line, self._configs[unescapes]).text


def changed_characters() -> list[str]:
    """The characters that some repair of ftfy changes by themselves."""
    from ftfy import chardata

    quotes = re.compile("|".join(p.pattern for p in (chardata.SINGLE_QUOTE_RE, chardata.DOUBLE_QUOTE_RE)))
    tables = {**chardata.LIGATURES, **chardata.WIDTH_MAP, **chardata.CONTROL_CHARS}
    controls = ["\r", "\u2028", "\u2029", *map(chr, range(0x80, 0xA0))]
    surrogates = map(chr, range(0xD800, 0xE000))
    return [*map(chr, tables), *quotes.findall("".join(map(chr, range(0x10000)))), *controls, *surrogates]


@lru_cache(maxsize=4)
def _ftfy(normalizer: str | None) -> Ftfy:
    return Ftfy(normalizer)


def wikitext_detokenize(text: str) -> str:
    """Undo the spaces that WikiText puts around marks, brackets and quotes."""
    contractions, marks, headings = WIKITEXT_PAIRS
    for old, new in contractions:
        text = text.replace(old, new)
    text = WIKITEXT_QUOTED_DIGIT.sub("/'[0-9]/", text)  # sic: the pattern that everyone uses replaces the digit
    for old, new in marks:
        text = text.replace(old, new)
    for pattern, replacement in WIKITEXT_BRACKETS:
        text = pattern.sub(replacement, text)
    for old, new in headings:
        text = text.replace(old, new)
    return text
