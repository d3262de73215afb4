"""The step shuffle: all sequences of many files in one random order, cut into OUT/data-00000.h5, data-00001.h5, …

Any sequence may land anywhere: the order is one permutation of all n sequences, computed position by position (a
Feistel network whose rounds are keyed by the seed, after Black and Rogaway 2002), so it needs no memory and any process
can work out any part of it. Output file f holds positions [f n / F, (f + 1) n / F). The compressed chunks are moved as
they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.engine import Task, run_step
from data_prep.errors import InputError
from data_prep.manifest import Record, input_identity, record
from data_prep.provenance import Span
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files

ROUNDS = 8
# Chunks held at a time while an output file is put in order.
BLOCK_BYTES = 256 << 20
OPEN_FILES = 64


class Permutation:
    """A random permutation of 0 … n - 1, computable at any position without a table.

    A Feistel network permutes 2^(2k) ≥ n numbers; one that lands at n or beyond is sent through again until it does not
    (at most four times on average), which leaves a permutation of the first n.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(f"{seed}/{size}".encode(), digest_size=ROUNDS * 8).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """What stands at `positions`, int (m,) -> int64 (m,)."""
        values = self._network(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every output bit depends on every input bit (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ShuffleTask(NamedTuple):
    """One output file: positions start … stop - 1 of the permutation over the rows of all sources."""

    sources: tuple[str, ...]
    ends: tuple[int, ...]  # running total of the sources' rows
    seed: int
    start: int
    stop: int
    target: str


def shuffle(
    inputs: Sequence[Path],
    out: Path,
    *,
    files: int,
    seed: int,
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the sequences of all files below `inputs`, each once, in random order to `files` files; the manifest.

    The order depends on the inputs' order, their file names and the seed only.

    Raises:
        InputError: no sequences, sequences of different lengths, fewer sequences than files.
    """
    sources = [path for given in inputs for path in sequence_files(given, recursive=True)]
    if len(set(sources)) < len(sources):
        raise InputError(f"{next(p for p in sources if sources.count(p) > 1)}: is named twice among the inputs")
    if any(path.is_relative_to(out) for path in sources):
        raise InputError(f"{out}: --out lies among the inputs: name another folder")
    sizes = []
    lengths: dict[int, Path] = {}
    for path in sources:
        with SequenceFile(path) as file:
            sizes.append(len(file))
            lengths.setdefault(file.max_seq_length, path)
    if len(lengths) > 1:
        (one, first), (other, second) = list(lengths.items())[:2]
        raise InputError(f"{second}: sequences of {other}, but {first} has {one}: shuffle one length at a time")
    total = sum(sizes)
    if not 1 <= files <= total:
        raise InputError(f"--files {files}: there are {total} sequences, so 1 to {total} files are possible")
    bounds = [number * total // files for number in range(files + 1)]
    ends = tuple(int(end) for end in np.cumsum(sizes))
    names = tuple(map(str, sources))
    tasks = []
    for number in range(files):
        target = str(out / f"data-{number:05d}.h5")
        task = ShuffleTask(names, ends, seed, bounds[number], bounds[number + 1], target)
        tasks.append(Task(f"data-{number:05d}", task))
    settings = {"files": files, "seed": seed, "inputs": [input_identity(path) for path in sources]}
    return run_step("shuffle", out, tasks, shuffle_file, settings=settings, processes=processes, overwrite=overwrite)


def shuffle_file(task: ShuffleTask) -> Record:
    """Write one output file: what the engine's processes run."""
    permutation = Permutation(task.ends[-1], task.seed)
    reader = _Chunks(task.sources, task.ends)
    with SequenceWriter(task.target, reader.max_seq_length) as writer:
        for block in reader.blocks(task.start, task.stop):
            writer.write_compressed(*reader.read(permutation(block)))
    reader.close()
    return record(outputs={Path(task.target).name: writer.summary}, counts={"sequences": writer.num_rows})


class _Chunks:
    """Compressed chunks by their number over all sources, read in the order in which they lie on disk."""

    def __init__(self, sources: Sequence[str], ends: Sequence[int]) -> None:
        self._sources = sources
        self._ends = np.array(ends)
        self._open: dict[int, SequenceFile] = {}
        self.max_seq_length = self._file(0).max_seq_length

    def _file(self, number: int) -> SequenceFile:
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = SequenceFile(self._sources[number])
        return self._open[number]

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The positions start … stop - 1 in blocks whose chunks fit into BLOCK_BYTES even uncompressed."""
        step = max(1, BLOCK_BYTES // (12 * self.max_seq_length))
        for first in range(start, stop, step):
            yield np.arange(first, min(first + step, stop))

    def read(self, numbers: np.ndarray) -> tuple[list[bytes], list[list[Span]] | None]:
        """The chunks of these numbers, in this order, and their spans if all of them have some."""
        chunks: list[bytes] = [b""] * len(numbers)
        spans: list[list[Span]] = [[]] * len(numbers)
        all_known = True
        files = np.searchsorted(self._ends, numbers, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        rows = numbers - starts[files]
        for place in np.argsort(numbers, kind="stable").tolist():
            file, row = self._file(int(files[place])), int(rows[place])
            chunks[place] = file.read_compressed(row)
            known = file.spans(row) if all_known else None
            if known is None:
                all_known = False
            else:
                spans[place] = known
        return chunks, spans if all_known else None

    def close(self) -> None:
        """Let go of all files."""
        for file in self._open.values():
            file.close()
