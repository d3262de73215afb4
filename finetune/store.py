"""Encoded examples on disk while a data set is prepared: memory holds their places, not their tokens."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.chat_format import Encoded

_TRAINED = np.int32(1 << 30)  # beyond any token id


class ExampleStore:
    """Append encoded examples, then read them back in any order: `store[i]`, `store.lengths`.

    A token takes four bytes on disk, an example eight in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._ends = array("q", [0])
        self._tokens: NDArray[np.int32] | None = None

    def append(self, example: Encoded) -> None:
        """Keep one more example."""
        packed = example.ids | np.where(example.trained, _TRAINED, np.int32(0))
        self._file.write(packed.astype("<i4", copy=False).tobytes())
        self._ends.append(self._ends[-1] + len(example.ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (n,)."""
        return np.diff(np.array(self._ends))

    def __getitem__(self, index: int) -> Encoded:
        """Example `index`."""
        if self._tokens is None:
            self._file.close()
            size = self._path.stat().st_size
            self._tokens = np.memmap(self._path, "<i4", "r") if size else np.empty(0, np.int32)
        packed = np.asarray(self._tokens[self._ends[index] : self._ends[index + 1]])
        return Encoded(packed & (_TRAINED - 1), (packed & _TRAINED) != 0)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._tokens = None
