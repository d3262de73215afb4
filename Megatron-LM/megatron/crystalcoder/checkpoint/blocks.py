"""Where the values of a logical tensor lie: rectangles of it, each at a place of some file.

Every format stores a logical tensor as such blocks: Hugging Face in one, row by row; Megatron one for each rank (and,
for qkv, each head), column by column, as its weights are the transposes. Reading, writing, converting and comparing all
work on blocks, so none of them knows formats.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError

Span = tuple[int, int]
CHUNK_BYTES = 4 << 20  # about what stays in a core's cache between the read and the comparison or copy
_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True)
class Block:
    """Rows x columns of a logical tensor (a vector is one row), stored at `offset` bytes of `file`.

    transposed: stored column by column (never a vector). pitch: values from the start of one stored row (or column) to
    that of the next.
    """

    file: Path
    offset: int
    rows: Span
    columns: Span
    transposed: bool
    pitch: int


@dataclass
class Stored:
    """A logical tensor in a checkpoint: its dtype, shape, and where it lies.

    copies: each a set of blocks that cover the tensor; they must agree (a tied head is a copy of the embedding, and
    `disagreement` says what it means when it is not). replicas: more copies, written but not read (norms are on every
    tensor-parallel rank). padding: blocks beyond the tensor's own size that must hold zeros.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    copies: list[list[Block]] = field(default_factory=list)
    replicas: list[list[Block]] = field(default_factory=list)
    padding: list[Block] = field(default_factory=list)
    disagreement: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (1, self.shape[0])

    @property
    def nbytes(self) -> int:
        """Of one copy."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def transposed(self) -> bool:
        """Whether its blocks are (all or none of them)."""
        return self.copies[0][0].transposed


class Files:
    """Open files by path, shared by threads. writable: for reading and writing, else for reading."""

    def __init__(self, writable: bool = False) -> None:
        self._flags = os.O_RDWR if writable else os.O_RDONLY
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        """The file's descriptor. Raises InputError when it is not there."""
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, self._flags)
                except OSError as error:
                    raise InputError(f"{path}: no such file: the checkpoint is incomplete, copy it again") from error
            return self._open[path]

    def read(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill a contiguous array from the file."""
        view, fd = memoryview(out.reshape(-1).view(np.uint8).data), self.fd(path)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}): copy it again") from error
            if count == 0:
                raise InputError(f"{path}: cannot be read, the file is damaged or cut short: copy it again")
            done += count

    def write(self, path: Path, offset: int, data: np.ndarray) -> None:
        """Write a contiguous array to the file."""
        view, fd = memoryview(data.reshape(-1).view(np.uint8).data), self.fd(path)
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Scratch:
    """Buffers that one thread uses again and again: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, use: str, shape: tuple[int, ...], itemsize: int) -> np.ndarray:
        """An uninitialised array of integers of this size; the next one for the same use takes its memory."""
        count = int(np.prod(shape)) * itemsize
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < count:
            buffer = self._buffers[use] = np.empty(count, np.uint8)
        return buffer[:count].view(_INTEGERS[itemsize]).reshape(shape)


def transposed_into(out: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Copy a matrix's transpose into an array, both contiguous; torch, unlike numpy, does it in cache-sized tiles."""
    torch.from_numpy(out).copy_(torch.from_numpy(matrix).t())
    return out


class Piece(NamedTuple):
    """Part of a block. place: where it lies in the array of the rows that were asked for; shape: of that place."""

    file: Path
    offset: int
    pitch: int
    place: tuple[slice, slice]
    shape: tuple[int, int]


def pieces(block: Block, rows: Span, itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Piece]:
    """What of a block lies in these rows of the tensor, cut into pieces of at most about `chunk_bytes`.

    The array meant by `place` is (rows, columns), or (columns, rows) for a transposed block.
    """
    within = (max(rows[0], block.rows[0]), min(rows[1], block.rows[1]))
    if within[0] >= within[1]:
        return
    if block.transposed:
        outer, inner, first, base = block.columns, within, block.rows[0], (0, rows[0])
        begin = block.columns[0]
    else:
        outer, inner, first, base = within, block.columns, block.columns[0], (rows[0], 0)
        begin = block.rows[0]
    step = max(1, chunk_bytes // max(1, block.pitch * itemsize))
    for start in range(outer[0], outer[1], step):
        stop = min(start + step, outer[1])
        offset = block.offset + ((start - begin) * block.pitch + inner[0] - first) * itemsize
        place = slice(start - base[0], stop - base[0]), slice(inner[0] - base[1], inner[1] - base[1])
        yield Piece(block.file, offset, block.pitch, place, (stop - start, inner[1] - inner[0]))


def read_piece(
    files: Files, piece: Piece, scratch: Scratch, itemsize: int, seen: Callable[[Piece, np.ndarray], None] | None = None
) -> np.ndarray:
    """One piece as an array of its shape, in scratch memory. seen: gets the bytes as they lie in the file."""
    outer, inner = piece.shape
    flat = scratch.array("piece", (outer * piece.pitch,), itemsize)
    read = flat[: (outer - 1) * piece.pitch + inner]
    files.read(piece.file, piece.offset, read)
    if seen is not None:
        seen(piece, read.view(np.uint8))
    return flat.reshape(outer, piece.pitch)[:, :inner]


def read_rows(
    files: Files,
    stored: Stored,
    copy: list[Block],
    rows: Span,
    scratch: Scratch,
    use: str = "source",
    seen: Callable[[Piece, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Rows of a tensor as integers, in scratch memory: (rows, columns), or (columns, rows) if stored transposed.

    seen: gets each piece's bytes as they lie in the file.
    """
    itemsize, shape = stored.dtype.itemsize, (rows[1] - rows[0], stored.matrix[1])
    out = scratch.array(use, shape[::-1] if stored.transposed else shape, itemsize)
    for block in copy:
        for piece in pieces(block, rows, itemsize):
            place = out[piece.place]
            if piece.pitch == piece.shape[1] and place.flags.c_contiguous:
                files.read(piece.file, piece.offset, place)
                if seen is not None:
                    seen(piece, place.reshape(-1).view(np.uint8))
            else:
                place[...] = read_piece(files, piece, scratch, itemsize, seen)
    return out


def read_tensor(files: Files, stored: Stored, scratch: Scratch) -> Tensor:
    """The whole logical tensor, in memory of its own."""
    values = read_rows(files, stored, stored.copies[0], (0, stored.matrix[0]), scratch)
    out = np.empty(stored.matrix, values.dtype)
    if stored.transposed:
        transposed_into(out, values)
    else:
        out[...] = values
    return torch.from_numpy(out).view(stored.dtype).reshape(stored.shape)
