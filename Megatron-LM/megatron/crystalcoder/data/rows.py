"""Rows of (tokens, loss mask, labels) from the files that hold them, as if they were one long array.

Two formats, in any mix: HDF5 sequence files (`data_prep.sequences`) and processed JSONL, one object a line with
`token_ids`, `loss_mask`, `label_ids`. In both, labels[t] is the token that follows tokens[t], and mask[t] says whether
predicting labels[t] counts: nothing is shifted here.

Opening validates: every JSONL row, and of every HDF5 file its shape and its first, middle and last row (the rest as
they are read, for a corpus can be terabytes). Rows are read when asked for; nothing is kept. A `Rows` may be used after
a fork and may be pickled: file handles belong to the process that opened them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, sequence_files

# JSONL keys in the order of a row's planes.
_KEYS = ("token_ids", "loss_mask", "label_ids")
# A longer line cannot be a row; without a bound, a file that is not JSONL at all would be read into memory whole.
_LONGEST_LINE = 64 * 2**20
_OPEN_FILES = 256


class Rows:
    """All rows of several files, numbered from 0 in the order of the files."""

    def __init__(self, files: Sequence[RowFile]) -> None:
        self.files = tuple(files)
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index`: int32 (3, s) of tokens, loss mask (0 or 1) and labels. InputError if the row is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.files[number].read(index - (self._ends[number - 1] if number else 0))

    def batch(self, indices: Sequence[int]) -> np.ndarray:
        """Rows `indices` at once: int32 (b, 3, s), each as `self[index]` gives it."""
        first = self.files[0]
        planes = np.empty((len(indices), len(_KEYS), first.seq_length), dtype=np.int32)
        for place, index in enumerate(indices):
            number = bisect_right(self._ends, index)
            planes[place] = self.files[number].read_unchecked(index - (self._ends[number - 1] if number else 0))
        if _in_range(planes, first.vocab_size):
            return planes
        return np.stack([self[index] for index in indices])  # says which row is wrong

    def fingerprint(self) -> str:
        """A hash to tell other data by; moving or renaming the files does not change it.

        It covers every byte of JSONL files, and of HDF5 files the size, the number of rows and three of them.
        """
        parts = (len(file).to_bytes(8, "little") + file.digest for file in self.files)
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def open_rows(paths: Sequence[Path], *, seq_length: int, vocab_size: int) -> Rows:
    """Open processed JSONL files, HDF5 sequence files, and directories of either (their files in sorted order).

    Raises InputError naming the file and the line or row: rows not of `seq_length`, ids outside [0, vocab_size), a mask
    that is not 0 or 1, a truncated or malformed line, a missing key, an HDF5 file without `data`, no rows at all.
    """
    if not paths:
        raise InputError("no data: name at least one .jsonl or .h5 file, or a directory of them")
    files = [file for path in paths for file in _files_at(Path(path), seq_length, vocab_size)]
    if not sum(map(len, files)):
        raise InputError(f"{paths[0]}: the data holds no rows: give files with at least one")
    return Rows(files)


def _files_at(path: Path, seq_length: int, vocab_size: int) -> list[RowFile]:
    if path.is_dir():
        members = sequence_files(path) if any(path.glob("*.h5")) else sorted(path.glob("*.jsonl"))
        if not members:
            raise InputError(f"{path}: no .h5 or .jsonl file in this directory: name the one that holds the rows")
        return [file for member in members for file in _files_at(Path(member), seq_length, vocab_size)]
    if not path.is_file():
        raise InputError(f"{path}: no such file or directory: check the data path")
    if path.suffix in (".h5", ".hdf5"):
        return [SequenceRows(path, seq_length, vocab_size)]
    if path.suffix == ".jsonl":
        return [JsonlRows(path, seq_length, vocab_size)]
    raise InputError(f"{path}: rows are read from .h5 and .jsonl files: unpack or convert this one")


class RowFile(ABC):
    """One file of rows of `seq_length`; `digest` identifies its content."""

    digest: bytes

    def __init__(self, path: Path, seq_length: int, vocab_size: int) -> None:
        self.path, self.seq_length, self.vocab_size = path, seq_length, vocab_size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Row `index` of this file, validated: int32 (3, s)."""

    def read_unchecked(self, index: int) -> np.ndarray:
        """Row `index` of this file: int32 (3, s), whose ids and mask may lie outside their ranges."""
        return self.read(index)

    def _checked(self, planes: Sequence[np.ndarray], place: str) -> np.ndarray:
        """Stack the three planes, or say what is wrong with the row at `place`."""
        for key, plane in zip(_KEYS, planes, strict=True):
            if plane.ndim != 1 or plane.dtype.kind not in "iufb":
                raise InputError(f"{place}: {key} is not a list of numbers: write this row again")
            if len(plane) != self.seq_length:
                raise InputError(
                    f"{place}: {key} has {len(plane)} entries where rows of {self.seq_length} are expected: "
                    f"train with sequence length {len(plane)}, or prepare the data again"
                )
        tokens, mask, labels = planes
        if not ((mask == 0) | (mask == 1)).all():
            raise InputError(
                f"{place}: loss_mask holds {_first(mask, (mask != 0) & (mask != 1))}: only 0 and 1 are allowed"
            )
        for key, ids in (("token_ids", tokens), ("label_ids", labels)):
            if ids.dtype.kind not in "iu":
                raise InputError(f"{place}: {key} holds numbers that are not integers: write this row again")
            outside = (ids < 0) | (ids >= self.vocab_size)
            if outside.any():
                raise InputError(
                    f"{place}: {key} holds {_first(ids, outside)}, outside the vocabulary of {self.vocab_size}: "
                    "the data was made with another tokenizer, or the model's vocabulary size is wrong"
                )
        return np.stack([plane.astype(np.int32, copy=False) for plane in planes])


def _in_range(planes: np.ndarray, vocab_size: int) -> bool:
    """What `_checked` would say of int32 planes (..., 3, s), at a tenth of its cost: negative is large if unsigned."""
    unsigned = planes.view(np.uint32)
    return bool(unsigned[..., ::2, :].max() < vocab_size and unsigned[..., 1, :].max() <= 1)


def _first(values: np.ndarray, wrong: np.ndarray) -> str:
    position = int(np.argmax(wrong))
    return f"{values[position]} at position {position}"


class JsonlRows(RowFile):
    """Processed JSONL: one pass notes where each line starts and validates it; rows are parsed again when read."""

    def __init__(self, path: Path, seq_length: int, vocab_size: int) -> None:
        super().__init__(path, seq_length, vocab_size)
        self._starts, self._lines = array("q"), array("q")  # byte offset and line number of each row
        content = hashlib.blake2b(digest_size=16)
        start = 0
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise InputError(
                        f"{path}:{number}: a line of {_LONGEST_LINE} bytes or more: this is not a JSONL file of rows"
                    )
                content.update(line)
                if not line.isspace():
                    self._starts.append(start)
                    self._lines.append(number)
                    self._parse(line, number)
                start += len(line)
        self.digest = content.digest()

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> np.ndarray:
        """See `RowFile.read`."""
        # Opened for each row: that is cheap beside parsing, and no handle is shared with another process.
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return self._parse(file.readline(_LONGEST_LINE), self._lines[index])

    def _parse(self, line: bytes, number: int) -> np.ndarray:
        place = f"{self.path}:{number}"
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            end = "the file ends amid this row" if not line.endswith(b"\n") else "the line may be cut short"
            raise InputError(f"{place}: not valid JSON ({error}); {end}: write it again") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a row is an object with {', '.join(_KEYS)}: write it again")
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise InputError(f"{place}: no {' and no '.join(missing)}: a row needs {', '.join(_KEYS)}")
        return self._checked([_as_array(row[key]) for key in _KEYS], place)


def _as_array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # lists of unequal lists
        return np.asarray(None)


class SequenceRows(RowFile):
    """One HDF5 sequence file."""

    def __init__(self, path: Path, seq_length: int, vocab_size: int) -> None:
        super().__init__(path, seq_length, vocab_size)
        with SequenceFile(path) as file:
            self._length = len(file)
            if file.max_seq_length != seq_length:
                raise InputError(
                    f"{path}: sequences of {file.max_seq_length} tokens where rows of {seq_length} are expected: "
                    f"train with sequence length {file.max_seq_length}, or prepare the data again"
                )
            content = hashlib.blake2b(path.stat().st_size.to_bytes(8, "little"), digest_size=16)
            for index in sorted({0, self._length // 2, self._length - 1} if self._length else set()):
                content.update(self._checked(list(file[index]), f"{path} row {index}").tobytes())
            self.digest = content.digest()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> np.ndarray:
        """See `RowFile.read`."""
        row = self.read_unchecked(index)
        return row if _in_range(row, self.vocab_size) else self._checked(list(row), f"{self.path} row {index}")

    def read_unchecked(self, index: int) -> np.ndarray:
        """See `RowFile.read_unchecked`."""
        return _opened(self)[index]


@lru_cache(maxsize=_OPEN_FILES)
def _opened(file: SequenceRows) -> SequenceFile:
    """The open file behind `file`. A SequenceFile opens itself anew in each process, so forked workers share none."""
    return SequenceFile(file.path)
