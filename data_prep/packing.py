"""Documents to sequences: concatenate, cut, never lose a token.

A document is BOS, its tokens, EOS. Documents follow each other in one stream, which is cut every L tokens into windows
of L + 1 that overlap by one: tokens = the first L, labels = the last L. So every token of the stream but the first is
predicted exactly once. The stream's end, shorter than a window, becomes one padded sequence with loss mask 0 on the
padding, where the reference drops it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Packer:
    """Pack one stream of documents into sequences of shape (3, max_seq_length) as they fill up.

    `add` takes a document's tokens (with BOS and EOS) and gives the sequences that it completes, (k, 3, L) int32;
    `finish` gives the rest, (0 or 1, 3, L). Memory: one document and one sequence.
    """

    def __init__(self, max_seq_length: int, pad_id: int) -> None:
        self.max_seq_length = max_seq_length
        self.pad_id = pad_id
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Append a document, int array (n,); the completed sequences, (k, 3, L), k may be 0."""
        self._pending.append(tokens)
        self._num_pending += len(tokens)
        if self._num_pending <= self.max_seq_length:
            return np.empty((0, 3, self.max_seq_length), np.int32)
        stream = np.concatenate(self._pending)
        count = (len(stream) - 1) // self.max_seq_length
        end = count * self.max_seq_length
        rows = np.empty((count, 3, self.max_seq_length), np.int32)
        rows[:, 0] = stream[:end].reshape(count, -1)
        rows[:, 1] = 1
        rows[:, 2] = stream[1 : end + 1].reshape(count, -1)
        # The last label is also the next sequence's first token.
        self._pending, self._num_pending = [stream[end:]], len(stream) - end
        return rows

    def finish(self) -> np.ndarray:
        """The rest of the stream as one padded sequence, (1, 3, L); (0, 3, L) if nothing is left to predict."""
        stream = np.concatenate([*self._pending, np.empty(0, np.int32)])
        self._pending, self._num_pending = [], 0
        if len(stream) < 2:
            return np.empty((0, 3, self.max_seq_length), np.int32)
        return padded_row(stream, self.max_seq_length, self.pad_id)[None]


def padded_row(stream: np.ndarray, max_seq_length: int, pad_id: int) -> np.ndarray:
    """One sequence (3, L) from 2 … L + 1 tokens: tokens and labels padded with `pad_id`, loss mask 0 on the padding."""
    count = len(stream) - 1
    row = np.empty((3, max_seq_length), np.int32)
    row[0, :count], row[0, count:] = stream[:-1], pad_id
    row[1, :count], row[1, count:] = 1, 0
    row[2, :count], row[2, count:] = stream[1:], pad_id
    return row


def stream_of(row: np.ndarray) -> np.ndarray:
    """The tokens that a sequence (3, L) was cut from: its tokens without padding, then the label of the last one.

    Padding is the run of loss mask 0 at the end: the padding id alone would not tell, it is often EOS.
    """
    count = row.shape[1]
    if not row[1, -1]:
        counted = np.flatnonzero(row[1])
        count = int(counted[-1]) + 1 if len(counted) else 0
    return np.concatenate([row[0, :count], row[2, count - 1 : count]])


def unpack(rows: Iterator[np.ndarray], eos_id: int) -> Iterator[np.ndarray]:
    """The documents of consecutive sequences as `Packer` made them, each with its EOS (tests and audits use this)."""
    document: list[np.ndarray] = []
    row = np.zeros((3, 1), np.int32)
    for row in rows:
        stream = stream_of(row)[:-1] if row[1, -1] else stream_of(row)
        ends = np.flatnonzero(stream == eos_id) + 1
        *whole, rest = np.split(stream, ends)
        for part in whole:
            yield np.concatenate([*document, part])
            document = []
        document.append(rest)
    if row[1, -1]:  # the stream ended with the last sequence's last label
        document.append(row[2, -1:])
    if any(map(len, document)):
        yield np.concatenate(document)
