"""Where a text's token ids may be cut without changing how either side is tokenised, and cutting anywhere else.

BPE merges two neighbours only if the merged piece is in the vocabulary. So if no piece holds the characters x and y
next to each other, no piece ever spans an x|y in a text, and the ids of the whole are the ids of the left followed by
the ids of the right: x|y is a *seam*. Byte pieces never merge, so both their sides are seams. Which pairs are seams is
read off the vocabulary, never guessed.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from data_prep.tokenizer import BYTE_PIECE, META, Tokenizer


class TokenCuts:
    """Cuts a text's ids between any two of its characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        controls = set(tokenizer.controls.values())
        self._is_plain = [
            number not in controls and not BYTE_PIECE.match(piece) for number, piece in enumerate(tokenizer.pieces)
        ]
        self._inner_pairs = {
            pair
            for piece, is_plain in zip(tokenizer.pieces, self._is_plain, strict=True)
            if is_plain
            for pair in pairwise(piece)
        }
        # Characters of each id. A byte piece counts if it begins a character: one whose first byte lies before the
        # text (a sequence may start in the middle of a character) is never split and moves with what is before it.
        self.characters = np.zeros(tokenizer.vocab_size, np.int64)
        for number, piece in enumerate(tokenizer.pieces):
            if byte := BYTE_PIECE.match(piece):
                self.characters[number] = int(byte[1], 16) & 0xC0 != 0x80
            elif self._is_plain[number]:
                self.characters[number] = len(piece)

    def is_seam(self, left: int, right: int) -> bool:
        """Whether the ids `left`, `right` next to each other are tokenised independently of each other."""
        if not (self._is_plain[left] and self._is_plain[right]):
            return True
        pieces = self._tokenizer.pieces
        return (pieces[left][-1:], pieces[right][:1]) not in self._inner_pairs

    def count(self, ids: np.ndarray) -> int:
        """Characters of a text's ids."""
        return int(self.characters[ids].sum())

    def starts_with_dummy(self, ids: np.ndarray) -> bool:
        """Whether the first character of a document's ids is the space that the tokenizer put there."""
        return len(ids) > 0 and self._tokenizer.pieces[ids[0]].startswith(META)

    def split(self, ids: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text's first `position` characters, and those of the rest.

        Both are what the tokenizer gives for these texts (if `ids` are what it gives for the whole); only the tokens
        between the seams around the cut are encoded again.
        """
        ends = np.cumsum(self.characters[ids])
        token = int(np.searchsorted(ends, position, side="right"))
        start = int(ends[token - 1]) if token else 0
        if token == len(ids):
            return ids, ids[:0]
        if start == position and (token == 0 or self.is_seam(ids[token - 1], ids[token])):
            return ids[:token], ids[token:]
        left = right = token
        while left > 0 and not self.is_seam(ids[left - 1], ids[left]):
            left -= 1
        while right + 1 < len(ids) and not self.is_seam(ids[right], ids[right + 1]):
            right += 1
        region = "".join(self._tokenizer.pieces[i] for i in ids[left : right + 1])
        offset = position - (int(ends[left - 1]) if left else 0)
        before, after = map(self._tokenizer.encode_inside, (region[:offset], region[offset:]))
        return (
            np.concatenate([ids[:left], np.array(before, ids.dtype)]),
            np.concatenate([np.array(after, ids.dtype), ids[right + 1 :]]),
        )
