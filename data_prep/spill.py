"""Rows on their way: the files that carry a shuffle's compressed rows from where they were to where they go.

A spill file holds the rows of one stretch of the inputs, ordered by destination, so that what goes to one output file
is one piece of it and is read in one go. It is written once, by one task, and mapped into memory to be read.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.provenance import SpanTable

HEADER = struct.Struct("<4q")  # rows, spans (-1: not known), bytes of the names, bytes of the rows


def write_spill(path: Path, destinations: np.ndarray, chunks: Sequence[bytes], spans: SpanTable | None) -> None:
    """Write rows with where they go, int64 (n,), and what is known of their documents."""
    order = np.argsort(destinations)
    ends = np.cumsum(np.array([0, *map(len, chunks)])[1:][order])
    paths = json.dumps(spans.paths).encode() if spans else b""
    num_spans = len(spans.spans) if spans else -1
    with path.open("wb", buffering=1 << 20) as file:
        file.write(HEADER.pack(len(chunks), num_spans, len(paths), int(ends[-1]) if len(ends) else 0))
        file.write(destinations[order].astype("<i8").tobytes())
        file.write(ends.astype("<i8").tobytes())
        if spans:
            ordered = spans.take(order)
            file.write(np.cumsum(ordered.counts).astype("<i8").tobytes())
            file.write(ordered.spans.astype("<u4").tobytes())
        file.write(paths)
        file.writelines(map(chunks.__getitem__, order.tolist()))


class Spilled(NamedTuple):
    """Rows that go to one place: where exactly, int64 (n,), their compressed bytes, their documents if known."""

    destinations: np.ndarray
    chunks: list[bytes]
    spans: SpanTable | None


class Spill:
    """A spill file, to be read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        num_rows, num_spans, num_names, _ = HEADER.unpack_from(self._bytes)
        self._at = HEADER.size
        self._destinations = self._array("<i8", num_rows)
        self._ends = self._array("<i8", num_rows)
        self._span_ends: np.ndarray | None = None
        if num_spans >= 0:
            self._span_ends = self._array("<i8", num_rows)
            self._spans = self._array("<u4", 3 * num_spans).reshape(-1, 3)
            self._paths: list[str] = json.loads(self._bytes[self._at : self._at + num_names])
        self._at += num_names

    def _array(self, dtype: str, count: int) -> np.ndarray:
        array = np.frombuffer(self._bytes, dtype, count, self._at)
        self._at += array.nbytes
        return array

    def read(self, start: int, stop: int) -> Spilled:
        """The rows that go to destinations `start` up to `stop`."""
        first, last = np.searchsorted(self._destinations, [start, stop]).tolist()
        ends = [_before(self._ends, first), *self._ends[first:last].tolist()]
        offset = self._at
        whole = self._bytes[offset + ends[0] : offset + ends[-1]]
        chunks = [whole[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]
        spans = None
        if self._span_ends is not None:
            begin = _before(self._span_ends, first)
            counts = np.diff(self._span_ends[first:last], prepend=begin)
            spans = SpanTable(self._paths, counts, self._spans[begin : begin + counts.sum()].copy())
        found = Spilled(self._destinations[first:last].copy(), chunks, spans)
        # Else what was read of all spill files would stay in this process's memory to its end.
        self._bytes.madvise(mmap.MADV_DONTNEED)
        return found


def _before(ends: np.ndarray, number: int) -> int:
    return int(ends[number - 1]) if number else 0
