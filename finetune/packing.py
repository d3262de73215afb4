"""Pack documents into rows of one length. A row, int32 (3, s), holds tokens, the loss mask, and labels.

`PackedRows` concatenates, then cuts, as the reference did: a row is a window of s + 1 tokens: tokens are the first s,
labels the last s, and the loss mask at t says whether label t is trained. Windows overlap by the one token that is a
label in one and the first input of the next, so every token of the stream is a label exactly once (the very first is
none: nothing predicts it). Documents run over row ends; positions and attention are not reset between them.

`BestFitRows` cuts no document: each stands whole in one row. There the label of a document's last token is the padding
id, untrained. So a token that is not the label before it begins a new document (`data/isolation.py` of the engine tells
documents apart by that), and in rows of `PackedRows` there is no such token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.chat_format import Encoded


class Part(NamedTuple):
    """A stretch of a document in a row: which document, and its first token there."""

    document: int
    start: int


class Documents(Protocol):
    """Encoded documents by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Encoded: ...


class Rows(Protocol):
    """Rows, built when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> NDArray[np.int32]: ...

    def parts(self, row: int) -> list[Part]:
        """The documents of a row in the order of its tokens."""


class PackedRows:
    """The rows of a token stream. `rows[i]` is int32 (3, s).

    The last row is filled up with `pad_id`, never trained, so that no token is lost. `lengths` saves a pass where they
    are known.
    """

    def __init__(
        self,
        documents: Documents | Iterable[Encoded],
        *,
        seq_length: int,
        pad_id: int,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        self._documents: Documents = documents if hasattr(documents, "__getitem__") else list(documents)  # type: ignore[assignment]
        if lengths is None:
            lengths = [len(self._documents[i].ids) for i in range(len(self._documents))]
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        self.seq_length, self._pad_id = seq_length, pad_id
        self.num_tokens = int(self._starts[-1])
        self._num_rows = -(-max(self.num_tokens - 1, 0) // seq_length)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        """Row `row`, int32 (3, s)."""
        ids = np.full(self.seq_length + 1, self._pad_id, np.int32)
        trained = np.zeros(self.seq_length + 1, np.int32)
        at = 0
        for number, start in self.parts(row, self.seq_length + 1):
            document = self._documents[number]
            piece = slice(start, start + self.seq_length + 1 - at)
            length = len(document.ids[piece])
            ids[at : at + length] = document.ids[piece]
            trained[at : at + length] = document.trained[piece]
            at += length
        return np.stack([ids[:-1], trained[1:], ids[1:]])

    def parts(self, row: int, length: int | None = None) -> list[Part]:
        """The documents among the row's tokens (or among the `length` tokens from its first on)."""
        if not 0 <= row < self._num_rows:
            raise IndexError(row)
        begin = row * self.seq_length
        end = min(begin + (length or self.seq_length), self.num_tokens)
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        parts = []
        while first < len(self._documents) and self._starts[first] < end:
            if self._starts[first + 1] > begin:
                parts.append(Part(first, max(0, begin - int(self._starts[first]))))
            first += 1
        return parts


class BestFitRows:
    """Whole documents, each in the row where it leaves the least room. None may be longer than `seq_length`."""

    def __init__(
        self,
        documents: Documents,
        *,
        seq_length: int,
        pad_id: int,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        if lengths is None:
            lengths = [len(documents[i].ids) for i in range(len(documents))]
        self._documents, self.seq_length, self._pad_id = documents, seq_length, pad_id
        self._rows = best_fit(lengths, seq_length)
        self.num_tokens = int(np.sum(np.asarray(lengths, np.int64)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        """Row `row`, int32 (3, s)."""
        planes = np.zeros((3, self.seq_length), np.int32)
        planes[0::2] = self._pad_id
        at = 0
        for number in self._rows[row]:
            ids, trained = self._documents[number]
            end = at + len(ids)
            planes[0, at:end] = ids
            planes[1, at : end - 1] = trained[1:]
            planes[2, at : end - 1] = ids[1:]
            at = end
        return planes

    def parts(self, row: int) -> list[Part]:
        """See `Rows.parts`."""
        return [Part(number, 0) for number in self._rows[row]]


def best_fit(lengths: Sequence[int] | NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row that it fills most; ties in the order given.

    Which amounts of room some open row has is kept as the bits of one integer, so the tightest one that is large enough
    is found without a search: the time is linear in the number of documents. Within a row, documents stand in the order
    of their numbers.

    Raises:
        ValueError: a document is longer than `capacity`.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"a document of {sizes.max()} tokens does not fit into a row of {capacity}")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r: some open row has room r
    order = np.argsort(-sizes, kind="stable")
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    for row_documents in rows:
        row_documents.sort()
    return rows
