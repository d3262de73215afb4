"""Pack documents into rows of one length: concatenate, then cut, as the reference did.

A row of length s is a window of s + 1 tokens: tokens are the first s, labels the last s, and the loss mask at t says
whether label t is trained. Windows overlap by the one token that is a label in one and the first input of the next, so
every token of the stream is a label exactly once (the very first is none: nothing predicts it). Documents run over row
ends; positions and attention are not reset between them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from finetune.chat_format import Encoded


class PackedRows:
    """The rows of a token stream, built when asked for. `rows[i]` is int32 (3, s): tokens, loss mask, labels.

    The last row is filled up with `pad_id`, never trained, so that no token is lost.
    """

    def __init__(self, documents: Iterable[Encoded], *, seq_length: int, pad_id: int) -> None:
        documents = list(documents)
        self.seq_length = seq_length
        ids = np.concatenate([d.ids for d in documents]) if documents else np.empty(0, np.int32)
        trained = np.concatenate([d.trained for d in documents]) if documents else np.empty(0, np.bool_)
        self.num_tokens = len(ids)
        self.num_trained_tokens = int(trained[1:].sum())
        num_rows = -(-max(len(ids) - 1, 0) // seq_length)
        padding = num_rows * seq_length + 1 - len(ids) if num_rows else 0
        self._ids = np.pad(ids, (0, padding), constant_values=pad_id)
        self._trained = np.pad(trained, (0, padding), constant_values=False)
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        """Row `row`, int32 (3, s)."""
        if not 0 <= row < self._num_rows:
            raise IndexError(row)
        start, end = row * self.seq_length, (row + 1) * self.seq_length
        return np.stack(
            [self._ids[start:end], self._trained[start + 1 : end + 1].astype(np.int32), self._ids[start + 1 : end + 1]]
        )
