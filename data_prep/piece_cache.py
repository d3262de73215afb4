"""Encode each word once: text is cut where the vocabulary proves that tokens never cross, and the words are remembered.

BPE merges two neighbours only if the result is a piece. So between two characters that stand next to each other in no
piece, no token ever spans, and the ids of a text are the ids of its left followed by those of its right (a *seam*). In
LLaMA's vocabulary no piece has a space after another character, none holds a newline, digits stand alone, and ASCII
letters never touch ASCII marks: real text falls into short words, and most of them have been seen before.

Characters are sorted into a few kinds; a seam is a pair of kinds of which no piece holds two side by side. That is read
off the vocabulary, never assumed; one whose pieces cross words (a space in the middle) has no seams to use, and
`Seams.of` says so. All is done on arrays: a table gives each character's kind, another each pair's seam, and pyarrow
finds the different words of a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

META = "▁"
ASCII_KINDS = {
    "letter": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "digit": "0123456789",
    "newline": "\n",
    "space": " ",
    "mark": "",  # the rest
}
# Beyond ASCII: characters that pieces hold beside others; and those that stand alone in every piece, or in none.
LETTER, DIGIT, NEWLINE, SPACE, MARK, TOUCHING, ALONE = range(7)
KIND_BITS = 3
# Words are remembered up to this number and length (bytes): about 150 MB at most.
MAX_WORDS = 500_000
MAX_LENGTH = 64
# Characters that are worked on at a time: bounds the arrays, whatever the text's length.
BLOCK = 1 << 20
NO_BORDERS = np.empty(0, np.int64)


def inner_pairs(pieces: Iterable[str]) -> set[tuple[str, str]]:
    """The pairs of characters that stand next to each other in some piece; any other pair is a seam."""
    return {pair for piece in pieces for pair in pairwise(piece)}


class Seams:
    """Where texts fall into words."""

    def __init__(self, pairs: set[tuple[str, str]]) -> None:
        self._kinds = np.full(0x110000, ALONE, np.uint8)
        self._kinds[:128] = MARK
        for kind, characters in enumerate(ASCII_KINDS.values()):
            self._kinds[list(characters.encode())] = kind
        self._kinds[[ord(c) for pair in pairs for c in pair if not c.isascii() and c != META]] = TOUCHING
        self._is_seam = np.ones(1 << 2 * KIND_BITS, np.bool_)
        for left, right in pairs:
            left_kind, right_kind = (SPACE if c == META else int(self._kinds[ord(c)]) for c in (left, right))
            self._is_seam[left_kind << KIND_BITS | right_kind] = False

    @classmethod
    def of(cls, pairs: set[tuple[str, str]]) -> Seams | None:
        """The seams of a vocabulary with these inner pairs; None if it has none before spaces (long words)."""
        return None if any(right == META and left != META for left, right in pairs) else cls(pairs)

    def starts(self, text: str, borders: np.ndarray = NO_BORDERS) -> np.ndarray:
        """Where the words of a text (not empty; spaces are ` `) start, and its end; words also end at `borders`."""
        if text.isascii():
            kinds = self._kinds[np.frombuffer(text.encode(), np.uint8)]
        else:
            kinds = self._kinds[np.frombuffer(text.encode("utf-32-le"), "<u4")]
        pairs = kinds[:-1] << KIND_BITS
        pairs |= kinds[1:]
        is_seam = self._is_seam[pairs]
        is_seam[borders - 1] = True
        return np.concatenate([[0], np.flatnonzero(is_seam) + 1, [len(text)]])

    def words(self, text: str) -> list[str]:
        """The words of a text."""
        return [text[start:end] for start, end in pairwise(self.starts(text))]


class PieceCache:
    """Encode texts word by word with `encode_word`; the same ids as `encode_word` of the whole text."""

    def __init__(self, seams: Seams, encode_word: Callable[[str], list[int]]) -> None:
        self._seams = seams
        self._known = _Known(encode_word)

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 (n,), read-only; spaces may be written ` ` or `▁`."""
        if 0 < len(text) <= MAX_LENGTH:  # hardly more than a word: the arrays would cost more than they save
            return np.frombuffer(self._known[text.replace(META, " ").encode()], np.int32)
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, faster than one after the other if they are short."""
        if len(self._known) > MAX_WORDS:
            self._known.clear()
        joined = "".join(texts).replace(META, " ")
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)  # of the texts, in characters
        token_ends = np.zeros(len(texts), np.int64)
        blocks: list[np.ndarray] = []
        start, size, num_tokens = 0, BLOCK, 0
        while start < len(joined):
            block = joined[start : start + size]
            here = slice(*np.searchsorted(ends, [start, start + len(block)], side="right"))
            starts = self._seams.starts(block, ends[here][ends[here] < start + len(block)] - start)
            if start + len(block) < len(joined):
                # The last word may go on in the next block, which begins with it.
                if len(starts) == 2:
                    size *= 2
                    continue
                starts = starts[:-1]
                block = block[: starts[-1]]
                here = slice(here.start, int(np.searchsorted(ends, start + len(block), side="right")))
            ids, word_ends = self._encode_words(block, starts)
            token_ends[here] = num_tokens + word_ends[np.searchsorted(starts, ends[here] - start) - 1]
            blocks.append(ids)
            num_tokens += len(ids)
            start, size = start + len(block), BLOCK
        stream = blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.empty(0, np.int32)])
        token_ends = np.maximum.accumulate(token_ends)  # empty texts at the beginning
        return [stream[begin:end] for begin, end in pairwise([0, *token_ends])]

    def _encode_words(self, text: str, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words between `starts`, and how many there are up to each word's end.

        Each different word is looked up once, then all are laid out.
        """
        import pyarrow  # not earlier: it starts a thread, and a process with threads is not forked (engine.py)

        arrow: Any = pyarrow
        data = text.encode()
        if len(data) != len(text):  # from characters to bytes
            is_first = np.frombuffer(data, np.uint8) & 0xC0 != 0x80
            starts = np.append(np.flatnonzero(is_first), len(data))[starts]
        buffers = [None, arrow.py_buffer(starts.astype(np.int32)), arrow.py_buffer(data)]
        encoded = arrow.Array.from_buffers(arrow.binary(), len(starts) - 1, buffers).dictionary_encode()
        which = encoded.indices.to_numpy()
        ids = list(map(self._known.__getitem__, encoded.dictionary.to_pylist()))
        table = np.frombuffer(b"".join(ids), np.int32)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids)) >> 2
        firsts = np.cumsum(lengths, dtype=np.int32) - lengths  # of the different words, in the table
        counts = lengths[which]
        ends = np.cumsum(counts, dtype=np.int32)
        index = np.repeat(firsts[which] - ends + counts, counts)
        index += np.arange(len(index), dtype=np.int32)
        return table[index], ends


class _Known(dict[bytes, bytes]):
    """Word (UTF-8) -> its ids as the bytes of an int32 array: joining bytes is the fastest way to a long array."""

    def __init__(self, encode_word: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: bytes) -> bytes:
        ids = array("i", self._encode_word(word.decode())).tobytes()
        if len(word) <= MAX_LENGTH:
            self[word] = ids
        return ids
