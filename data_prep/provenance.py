"""Which documents a sequence came from: kept beside `data` in the same file, through FIM and shuffling.

A `Span` says that from some position on a sequence holds document `document` (line, array element or parquet row, from
0) of the file `path`, from that document's token `start` on; a sequence's spans are in the order of its tokens. FIM on
packed rows moves text within a sequence and leaves its spans as they were.

In the file, group `provenance`: `paths` (the names, each once), `row_ends` (n: how many spans there are up to and with
each row) and `path`, `document`, `start` (one entry per span, unsigned 32 bits), deflated to some bytes a sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import h5py
import numpy as np

GROUP = "provenance"


class Span(NamedTuple):
    """A stretch of one document in a sequence."""

    path: str
    document: int
    start: int


class SpanTracker:
    """Follow a packed stream: documents go in, the spans of each window of `max_seq_length` tokens come out."""

    def __init__(self, max_seq_length: int) -> None:
        self._length = max_seq_length
        self._documents: deque[tuple[int, int, str, int]] = deque()  # begin and end in the stream, path, document
        self._end = 0  # of the stream so far
        self._taken = 0  # windows given out

    def add(self, path: str, document: int, num_tokens: int) -> None:
        """A document of `num_tokens` tokens, BOS and EOS included, follows in the stream."""
        self._documents.append((self._end, self._end + num_tokens, path, document))
        self._end += num_tokens

    def take(self, count: int) -> list[list[Span]]:
        """The spans of the next `count` windows."""
        windows = []
        for _ in range(count):
            begin, end = self._taken * self._length, (self._taken + 1) * self._length
            while self._documents and self._documents[0][1] <= begin:
                self._documents.popleft()
            spans = []
            for first, _, path, document in self._documents:
                if first >= end:
                    break
                spans.append(Span(path, document, max(0, begin - first)))
            windows.append(spans)
            self._taken += 1
        return windows


class ProvenanceWriter:
    """Collect the spans of a file's rows and write them at its end."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._spans: list[tuple[int, int, int]] = []
        self._row_ends: list[int] = []

    def append(self, spans: Sequence[Span]) -> None:
        """The spans of the next row."""
        for path, document, start in spans:
            self._spans.append((self._paths.setdefault(path, len(self._paths)), document, start))
        self._row_ends.append(len(self._spans))

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._row_ends)

    def save(self, file: h5py.File) -> None:
        """Write the group."""
        group = file.create_group(GROUP)
        packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        # Of fixed length: what HDF5 keeps for others may hold whatever was in memory, and files could not be compared.
        paths = np.array([path.encode() for path in self._paths])
        group.create_dataset("paths", data=paths, **packed)
        table = np.array(self._spans, np.uint32).reshape(-1, 3)
        columns = {"row_ends": np.array(self._row_ends, np.uint32)}
        columns |= {name: table[:, number] for number, name in enumerate(("path", "document", "start"))}
        for name, column in columns.items():
            # One chunk where it fits: a chunk that is never filled would still take its room.
            options = {**packed, "chunks": (min(len(column), 1 << 16),)} if len(column) else {}
            group.create_dataset(name, data=column, **options)


class ProvenanceReader:
    """The spans of a file's rows; made by `read_provenance`."""

    def __init__(self, group: h5py.Group) -> None:
        self._paths = [path.decode() for path in group["paths"][:]]
        self._row_ends = group["row_ends"][:]
        self._spans = np.stack([group[name][:] for name in ("path", "document", "start")], axis=1)

    def __getitem__(self, row: int) -> list[Span]:
        begin = int(self._row_ends[row - 1]) if row else 0
        rows = self._spans[begin : int(self._row_ends[row])].tolist()
        return [Span(self._paths[path], document, start) for path, document, start in rows]


def read_provenance(file: h5py.File) -> ProvenanceReader | None:
    """The provenance of an open sequence file, None if it has none."""
    group = file.get(GROUP)
    return ProvenanceReader(group) if isinstance(group, h5py.Group) else None
