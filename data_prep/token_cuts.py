"""Where a text's token ids may be cut without changing how either side is tokenised, and cutting anywhere else.

Tokens never cross a *seam*, a pair of characters that stands side by side in no piece (see piece_cache.py); byte pieces
never merge, so both their sides are seams too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_prep.piece_cache import META
from data_prep.tokenizer import Tokenizer

EMPTY = np.empty(0, np.int32)


class Cut(NamedTuple):
    """The ids of a text's two sides: `ids[:left]` and `before`, then `after` and `ids[right:]`."""

    left: int
    before: np.ndarray
    after: np.ndarray
    right: int


class TokenCuts:
    """Cuts a text's ids between any two of its characters.

    A text's `ends`, int (n,), say how many characters there are up to and with each of its n ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = {*tokenizer.controls.values(), *tokenizer.byte_ids}
        pieces = ["" if number in special else piece for number, piece in enumerate(tokenizer.pieces)]
        # Characters of each id. A byte piece counts if it begins a character: one whose first byte lies before the
        # text (a sequence may start in the middle of a character) is never split and moves with what is before it.
        self._characters = np.array([len(piece) for piece in pieces])
        for number, byte in tokenizer.byte_ids.items():
            self._characters[number] = byte & 0xC0 != 0x80
        self._first = [piece[:1] for piece in pieces]
        self._last = [piece[-1:] for piece in pieces]

    def is_seam(self, left: int, right: int) -> bool:
        """Whether the ids `left`, `right` next to each other are tokenised independently of each other."""
        return (self._last[left], self._first[right]) not in self._tokenizer.inner_pairs

    def ends(self, ids: np.ndarray) -> np.ndarray:
        """Characters of a text's ids up to and with each of them."""
        ends: np.ndarray = self._characters[ids].cumsum()
        return ends

    def starts_with_dummy(self, ids: np.ndarray) -> bool:
        """Whether the first character of a document's ids is the space that the tokenizer put there."""
        return len(ids) > 0 and self._tokenizer.pieces[ids[0]].startswith(META)

    def cut(self, ids: np.ndarray, ends: np.ndarray, position: int) -> Cut:
        """Cut a text behind its first `position` characters.

        Both sides are what the tokenizer gives for these texts (if `ids` are what it gives for the whole); only the
        tokens between the seams around the cut are encoded again.
        """
        token = int(ends.searchsorted(position, side="right"))
        if token == len(ids):
            return Cut(token, EMPTY, EMPTY, token)
        start = int(ends[token - 1]) if token else 0
        if start == position and (token == 0 or self.is_seam(ids[token - 1], ids[token])):
            return Cut(token, EMPTY, EMPTY, token)
        left, right = token, token + 1
        while left > 0 and not self.is_seam(ids[left - 1], ids[left]):
            left -= 1
        while right < len(ids) and not self.is_seam(ids[right - 1], ids[right]):
            right += 1
        pieces = self._tokenizer.pieces
        region = "".join([pieces[i] for i in ids[left:right].tolist()])
        offset = position - (int(ends[left - 1]) if left else 0)
        encode = self._tokenizer.encode_inside
        return Cut(left, encode(region[:offset]), encode(region[offset:]), right)

    def cut_twice(
        self, ids: np.ndarray, ends: np.ndarray, low: int, high: int
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """The ids, in stretches, of a text's first `low` characters, of those from there to `high`, and of the rest."""
        outer = self.cut(ids, ends, high)
        suffix = [outer.after, ids[outer.right :]]
        start = int(ends[outer.left - 1]) if outer.left else 0
        if low < start:
            inner = self.cut(ids, ends, low)
            return [ids[: inner.left], inner.before], [inner.after, ids[inner.right : outer.left], outer.before], suffix
        # Between the same two seams: cut what has been encoded there.
        before = outer.before
        inner = self.cut(before, self.ends(before), low - start)
        prefix = [ids[: outer.left], before[: inner.left], inner.before]
        return prefix, [inner.after, before[inner.right :]], suffix
