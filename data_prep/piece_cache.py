"""Encode each word once: text is cut where the vocabulary proves that tokens never cross, and the words are remembered.

BPE merges two neighbours only if the result is a piece. So between two characters that stand next to each other in no
piece, no token ever spans, and the ids of a text are the ids of its left followed by those of its right (a *seam*). In
LLaMA's vocabulary no piece has a space after another character, none holds a newline, digits stand alone, and ASCII
letters never touch ASCII marks: real text falls into short words, and most of them have been seen before.

Which kinds of characters may be cut apart is read off the vocabulary, never assumed; one whose pieces cross words (a
space in the middle) has no seams to use, and `word_pattern` says so.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

META = "▁"
KINDS = {
    "letter": "A-Za-z",
    "digit": "0-9",
    "newline": r"\n",
    "mark": r"\x00-\x09\x0b-\x1f!-/:-@\[-`{-\x7f",
}
BEYOND = r"[^\x00-\x7f]"
# Words are remembered up to this number and length: about 150 MB at most.
MAX_WORDS = 500_000
MAX_LENGTH = 64


def inner_pairs(pieces: Iterable[str]) -> set[tuple[str, str]]:
    """The pairs of characters that stand next to each other in some piece; any other pair is a seam."""
    return {pair for piece in pieces for pair in pairwise(piece)}


def word_pattern(pairs: set[tuple[str, str]]) -> re.Pattern[str] | None:
    """A pattern whose matches are the words of a text, each from seam to seam; None if there are no usable seams.

    A word is the spaces before it and: a run of kinds that touch each other in some piece (or one character, of kinds
    that touch nothing), or, where characters beyond ASCII take part, all up to the next space or kind that never
    touches those.
    """
    if any(right == META and left != META for left, right in pairs):
        return None
    matchers = {kind: re.compile(f"[{characters}]") for kind, characters in KINDS.items()}

    def kind_of(character: str) -> str:
        if character == META:
            return "space"
        return next((kind for kind, matcher in matchers.items() if matcher.match(character)), "beyond")

    touching = {(kind_of(left), kind_of(right)) for left, right in pairs}
    groups = [{kind} for kind in KINDS]
    for left, right in touching:
        joined = [group for group in groups if left in group or right in group]
        if left in KINDS and right in KINDS and len(joined) == 2:
            groups = [group for group in groups if group not in joined] + [joined[0] | joined[1]]
    alternatives, beyond = [], r"[^\x00-\x7f"
    for group in groups:
        characters = "".join(KINDS[kind] for kind in KINDS if kind in group)
        is_run = any((left, right) in touching for left in group for right in group)
        touches_beyond = any((kind, "beyond") in touching or ("beyond", kind) in touching for kind in group)
        # Possessive, so that a run that goes on beyond ASCII is not cut short but left to the last alternative.
        alternatives.append(f"[{characters}]{'++' if is_run else ''}" + (f"(?!{BEYOND})" if touches_beyond else ""))
        if touches_beyond:
            beyond += "]|[" + characters
    return re.compile(f" *+(?:{'|'.join(alternatives)}|(?:{beyond}])++)| +")


class PieceCache:
    """Encode texts word by word with `encode_word`; the same ids as `encode_word` of the whole text."""

    def __init__(self, pattern: re.Pattern[str], encode_word: Callable[[str], list[int]]) -> None:
        self._words = pattern.findall
        self._known = _Known(encode_word)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (n,), read-only; spaces may be written ` ` or `▁`."""
        words = self._words(text.replace(META, " "))
        known = self._known
        if len(known) > MAX_WORDS:
            known.clear()
        return np.frombuffer(b"".join(map(known.__getitem__, words)), np.int32)


class _Known(dict[str, bytes]):
    """Word -> its ids as the bytes of an int32 array: joining bytes is the fastest way to a long array."""

    def __init__(self, encode_word: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self._encode_word(word)).tobytes()
        if len(word) <= MAX_LENGTH:
            self[word] = ids
        return ids
