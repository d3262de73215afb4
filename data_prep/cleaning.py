"""Changes to a text before it is tokenised: ftfy's repairs and WikiText's detokenisation. Off unless asked for.

The reference runs ftfy on everything, code too, where it also changes quotes, entities, line ends and control
characters; its configurations say so, so the door that reads them does it as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A text of these characters only is left alone by every repair of ftfy: nothing to decode, unescape, uncurl, widen,
# normalise or strip. That holds for most code and takes a thousandth of the time.
NOT_PLAIN = re.compile(r"[^\t\n\x20-\x25\x27-\x7e]")

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


@dataclass(frozen=True)
class Cleaning:
    """Which changes are made: none by default."""

    use_ftfy: bool = False
    ftfy_normalizer: str | None = "NFC"
    wikitext_detokenize: bool = False

    def __call__(self, text: str) -> str:
        """The text after the changes."""
        if self.use_ftfy and NOT_PLAIN.search(text):
            import ftfy

            text = ftfy.fix_text(text, normalization=self.ftfy_normalizer)
        return wikitext_detokenize(text) if self.wikitext_detokenize else text


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
