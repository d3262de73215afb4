"""Where a text's token ids may be cut without changing how either side is tokenised, and cutting anywhere else.

Tokens never cross a *seam*, a pair of characters that stands side by side in no piece (see piece_cache.py); byte pieces
never merge, so both their sides are seams too.
"""

from __future__ import annotations

import numpy as np

from data_prep.piece_cache import META
from data_prep.tokenizer import Tokenizer


class TokenCuts:
    """Cuts a text's ids between any two of its characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = {*tokenizer.controls.values(), *tokenizer.byte_ids}
        self._is_plain = [number not in special for number in range(tokenizer.vocab_size)]
        # Characters of each id. A byte piece counts if it begins a character: one whose first byte lies before the
        # text (a sequence may start in the middle of a character) is never split and moves with what is before it.
        lengths = [len(piece) if plain else 0 for piece, plain in zip(tokenizer.pieces, self._is_plain, strict=True)]
        self.characters = np.array(lengths)
        for number, byte in tokenizer.byte_ids.items():
            self.characters[number] = byte & 0xC0 != 0x80

    def is_seam(self, left: int, right: int) -> bool:
        """Whether the ids `left`, `right` next to each other are tokenised independently of each other."""
        if not (self._is_plain[left] and self._is_plain[right]):
            return True
        pieces = self._tokenizer.pieces
        return (pieces[left][-1:], pieces[right][:1]) not in self._tokenizer.inner_pairs

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
            np.concatenate([ids[:left], before]),
            np.concatenate([after, ids[right + 1 :]]),
        )
