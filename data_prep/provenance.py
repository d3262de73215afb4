"""Which documents a sequence came from: kept beside `data` in the same file, through FIM and shuffling.

A `Span` says that from some position on a sequence holds document `document` (line, array element or parquet row, from
0) of the file `path`, from that document's token `start` on; a sequence's spans are in the order of its tokens. FIM on
packed rows moves text within a sequence and leaves its spans as they were. Many rows' spans are a `SpanTable`.

In the file, group `provenance`: `paths` (the names, each once), `row_ends` (n: how many spans there are up to and with
each row) and `path`, `document`, `start` (one entry per span, unsigned 32 bits), deflated to some bytes a sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import h5py
import numpy as np

GROUP = "provenance"
COLUMNS = ("path", "document", "start")
ROWS_WAITING = 4096  # rows given one by one become columns in batches


class Span(NamedTuple):
    """A stretch of one document in a sequence."""

    path: str
    document: int
    start: int


class SpanTable(NamedTuple):
    """The spans of n rows as columns.

    Attributes:
        paths: names of files.
        counts: (n,), how many spans each row has.
        spans: (counts.sum(), 3) uint32: index into `paths`, document, start; rows one after another.
    """

    paths: list[str]
    counts: np.ndarray
    spans: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[Span]]) -> SpanTable:
        """The table of these rows' spans."""
        paths: dict[str, int] = {}
        spans = [(paths.setdefault(path, len(paths)), document, start) for row in rows for path, document, start in row]
        return cls(list(paths), np.array([len(row) for row in rows], int), np.array(spans, np.uint32).reshape(-1, 3))

    @classmethod
    def join(cls, tables: Sequence[SpanTable]) -> SpanTable:
        """The rows of all tables, one table after another; each name once."""
        paths: dict[str, int] = {}
        renamed = []
        for table in tables:
            numbers = np.array([paths.setdefault(path, len(paths)) for path in table.paths], np.uint32)
            spans = table.spans.copy()
            if len(spans):
                spans[:, 0] = numbers[spans[:, 0]]
            renamed.append(spans)
        counts = np.concatenate([np.empty(0, int), *(table.counts for table in tables)])
        return cls(list(paths), counts, np.concatenate([np.empty((0, 3), np.uint32), *renamed]))

    @property
    def digest(self) -> str:
        """A checksum over all of it."""
        digest = hashlib.blake2b(json.dumps(self.paths).encode(), digest_size=8)
        digest.update(self.counts.astype("<i8").tobytes())
        digest.update(self.spans.astype("<u4").tobytes())
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> SpanTable:
        """The table of the rows with these numbers, in this order."""
        counts = self.counts[rows]
        begins = (np.cumsum(self.counts) - self.counts)[rows]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return SpanTable(self.paths, counts, self.spans[np.repeat(begins, counts) + within])


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
    """Collect the spans of a file's rows and write them at its end. Memory: 12 bytes a span."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._tables: list[SpanTable] = []
        self._waiting: list[Sequence[Span]] = []
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._num_rows + len(self._waiting)

    def append(self, rows: Iterable[Sequence[Span]]) -> None:
        """The spans of the next rows, a few at a time."""
        self._waiting += rows
        if len(self._waiting) >= ROWS_WAITING:
            self._convert()

    def _convert(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.extend(SpanTable.of(waiting))

    def extend(self, table: SpanTable) -> None:
        """The spans of the next rows, many at a time."""
        if self._waiting:
            self._convert()
        used, places = np.unique(table.spans[:, 0], return_inverse=True)
        numbers = [self._paths.setdefault(table.paths[i], len(self._paths)) for i in used.tolist()]
        spans = table.spans.copy()
        spans[:, 0] = np.array(numbers, np.uint32)[places]
        self._tables.append(SpanTable([], table.counts, spans))
        self._num_rows += len(table.counts)

    def save(self, file: h5py.File) -> SpanTable:
        """Write the group; what it holds."""
        if self._waiting:
            self._convert()
        group = file.create_group(GROUP)
        packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        # Of fixed length: what HDF5 keeps for others may hold whatever was in memory, and files could not be compared.
        paths = np.array([path.encode() for path in self._paths])
        group.create_dataset("paths", data=paths, **packed)
        spans = np.concatenate([table.spans for table in self._tables])
        counts = np.concatenate([table.counts for table in self._tables])
        columns = {"row_ends": np.cumsum(counts).astype(np.uint32)}
        columns |= {name: spans[:, number] for number, name in enumerate(COLUMNS)}
        for name, column in columns.items():
            # One chunk where it fits: a chunk that is never filled would still take its room.
            options = {**packed, "chunks": (min(len(column), 1 << 16),)} if len(column) else {}
            group.create_dataset(name, data=column, **options)
        return SpanTable(list(self._paths), counts, spans)


class ProvenanceReader:
    """The spans of a file's rows; made by `read_provenance`.

    Raises:
        ValueError, KeyError, OSError: they are damaged.
    """

    def __init__(self, group: h5py.Group) -> None:
        row_ends = group["row_ends"][:].astype(int)
        spans = np.stack([group[name][:] for name in COLUMNS], axis=1)
        self.table = SpanTable([path.decode() for path in group["paths"][:]], np.diff(row_ends, prepend=0), spans)
        self._row_ends = row_ends
        is_whole = len(spans) == (row_ends[-1] if len(row_ends) else 0)
        if not is_whole or (len(spans) and spans[:, 0].max() >= len(self.table.paths)):
            raise ValueError("its columns do not fit together")

    def __getitem__(self, row: int) -> list[Span]:
        begin = int(self._row_ends[row - 1]) if row else 0
        rows = self.table.spans[begin : int(self._row_ends[row])].tolist()
        return [Span(self.table.paths[path], document, start) for path, document, start in rows]


def read_provenance(file: h5py.File) -> ProvenanceReader | None:
    """The provenance of an open sequence file, None if it has none."""
    group = file.get(GROUP)
    return ProvenanceReader(group) if isinstance(group, h5py.Group) else None
