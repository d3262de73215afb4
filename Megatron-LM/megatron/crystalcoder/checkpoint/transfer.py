"""Move tensors from one checkpoint's files into another's: read, check, cast, transpose, write, read back, compare.

Each job is one tensor, or rows of it. Threads work on several at once (what takes time here runs outside Python's
lock), each in memory of its own that it uses again and again, so memory depends on the largest tensor and the number of
threads alone.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import (
    CHUNK_BYTES,
    Block,
    Files,
    Piece,
    Scratch,
    Span,
    Stored,
    pieces,
    read_piece,
    read_rows,
    transposed_into,
)
from megatron.crystalcoder.checkpoint.crc import Part, combined_crc, crc32, read_crc, whole_crc, write_crc
from megatron.crystalcoder.checkpoint.placement import BlockWeights
from megatron.crystalcoder.checkpoint.tensor_files import Record
from megatron.crystalcoder.checkpoint.verify import all_finite

_BAND_BYTES = 32 << 20  # of a tensor that needs no transposing: rows at a time
MAX_QUEUE_SIZE = 50


def default_workers() -> int:
    """Two to four threads keep a disk busy; each holds two of the largest tensors."""
    return min(len(os.sched_getaffinity(0)), 4)


@dataclass(frozen=True)
class Job:
    """Rows of one logical tensor to move."""

    name: str
    rows: Span


def jobs_of(source: Stored, target: Stored, name: str) -> list[Job]:
    """A tensor cut into rows where both sides' blocks allow it: anywhere when none is stored transposed."""
    rows, columns = source.matrix
    blocks = [
        block
        for stored in (source, target)
        if stored.transposed
        for copy in (*stored.copies, *stored.replicas)
        for block in copy
    ]
    if blocks:
        ends = {0, rows, *(end for block in blocks for end in block.rows)}
        cuts = sorted(end for end in ends if not any(block.rows[0] < end < block.rows[1] for block in blocks))
    else:
        step = max(1, _BAND_BYTES // (columns * source.dtype.itemsize))
        cuts = [*range(0, rows, step), rows]
    return [Job(name, (start, stop)) for start, stop in pairwise(cuts)]


class Transfer:
    """Moves every tensor of `source` into the places that `target`, laid out already, has for them.

    verify: hold what is read of the source against the checksums that its zip files have, read each tensor back from
    the target, and compare it with the source, bit for bit (after the cast, if the target's dtype is another). resume:
    leave what is in its place already. where: the source's name in messages.
    """

    def __init__(self, source: BlockWeights, target: BlockWeights, where: str, *, verify: bool, resume: bool) -> None:
        self._source, self._target, self._where = source, target, where
        self._verify, self._resume = verify, resume
        self._local = threading.local()
        self._parts: dict[Path, list[Part]] = defaultdict(list)
        self._seen: dict[Path, list[Part]] = defaultdict(list)
        self.nbytes = sum(source.stored[name].nbytes for name in target.stored)

    def run(self, *, workers: int, max_queue_size: int, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Move everything. At most `workers`, and at most `max_queue_size`, tensors are in work at a time.

        progress: called with the bytes of the source that are done since the last call. Raises InputError for bad
        tensors and when something reads back other than it was written, OSError when the disk is full.
        """
        jobs = iter(self._jobs())
        pending: set[Future[int]] = set()
        pool = ThreadPoolExecutor(
            min(workers, max_queue_size), "convert", initializer=torch.set_num_threads, initargs=(1,)
        )
        with Files() as self._reading, Files(writable=True) as self._writing, pool:
            try:
                for job in jobs:
                    pending.add(pool.submit(self._move, job))
                    if len(pending) >= max_queue_size:
                        pending = self._collect(pending, progress)
                while pending:
                    pending = self._collect(pending, progress)
                self._check_source()
                self._write_checksums()
            except BaseException:
                self._source.abandon()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _jobs(self) -> Iterator[Job]:
        for name in sorted(self._target.stored, key=self._source.arrival):
            yield from jobs_of(self._source.stored[name], self._target.stored[name], name)

    @staticmethod
    def _collect(pending: set[Future[int]], progress: Callable[[int], None]) -> set[Future[int]]:
        done, still = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            progress(future.result())
        return still

    def _move(self, job: Job) -> int:
        scratch = self._scratch()
        source, target = self._source.locate(job.name), self._target.stored[job.name]
        seen = self._note if self._verify else None
        values = read_rows(self._reading, source, source.copies[0], job.rows, scratch, seen=seen)
        size = values.nbytes
        for copy in source.copies[1:]:
            if not self._same(self._reading, source, copy, job.rows, values):
                raise InputError(source.disagreement)
        if job.rows[0] == 0:
            self._check_padding(job.name, source)
        if not all_finite(values, source.dtype):
            raise InputError(
                f"{self._where}: tensor {job.name} has NaN or infinite values: take a checkpoint from before they arose"
            )
        if target.dtype != source.dtype:
            values = self._cast(job.name, values, source.dtype, target.dtype)
        if target.transposed != source.transposed:
            values = transposed_into(scratch.array("target", values.shape[::-1], values.itemsize), values)
        for copy in (*target.copies, *target.replicas):
            self._write(target, copy, job.rows, values)
            if self._verify and not self._same(self._writing, target, copy, job.rows, values):
                raise InputError(f"{copy[0].file}: tensor {job.name} was not written as it was read: check the disk")
        return size

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return self._local.scratch

    def _same(self, files: Files, stored: Stored, copy: list[Block], rows: Span, values: np.ndarray) -> bool:
        itemsize = stored.dtype.itemsize
        return all(
            np.array_equal(read_piece(files, piece, self._scratch(), itemsize), values[piece.place])
            for block in copy
            for piece in pieces(block, rows, itemsize)
        )

    def _check_padding(self, name: str, stored: Stored) -> None:
        for block in stored.padding:
            for piece in pieces(block, block.rows, stored.dtype.itemsize):
                if read_piece(self._reading, piece, self._scratch(), stored.dtype.itemsize).any():
                    raise InputError(
                        f"{block.file}: the padding of tensor {name} is not zero, so this model is not the padded one "
                        "that args says: something else than training changed it"
                    )

    def _cast(self, name: str, values: np.ndarray, old: torch.dtype, new: torch.dtype) -> np.ndarray:
        out = self._scratch().array("cast", values.shape, new.itemsize)
        torch.from_numpy(out).view(new).copy_(torch.from_numpy(values).view(old))
        if not all_finite(out, new):
            raise InputError(
                f"{self._where}: tensor {name} does not fit {str(new).removeprefix('torch.')}: "
                "its largest value overflows; choose --dtype bfloat16 or float32"
            )
        return out

    def _write(self, stored: Stored, copy: list[Block], rows: Span, values: np.ndarray) -> None:
        itemsize, scratch = stored.dtype.itemsize, self._scratch()
        for block in copy:
            for piece in pieces(block, rows, itemsize):
                data = values[piece.place]
                if piece.pitch > piece.shape[1]:  # padding beyond the tensor's own size
                    padded = scratch.array("padded", (piece.shape[0], piece.pitch), itemsize)
                    padded[:, : piece.shape[1]] = data
                    padded[:, piece.shape[1] :] = 0
                    data = padded
                elif not data.flags.c_contiguous:
                    together = scratch.array("padded", piece.shape, itemsize)
                    together[...] = data
                    data = together
                flat = data.reshape(-1).view(np.uint8)
                if not (self._resume and self._is_there(piece.file, piece.offset, flat)):
                    self._writing.write(piece.file, piece.offset, data)
                if self._target.records:
                    self._parts[piece.file].append(Part(piece.offset, data.nbytes, crc32(flat)))

    def _is_there(self, file: Path, offset: int, data: np.ndarray) -> bool:
        for start in range(0, data.size, CHUNK_BYTES):
            part = data[start : start + CHUNK_BYTES]
            found = self._scratch().array("piece", part.shape, 1).view(np.uint8)
            self._writing.read(file, offset + start, found)
            if not np.array_equal(found, part):
                return False
        return True

    def _note(self, piece: Piece, data: np.ndarray) -> None:
        """Keep the checksum of what has been read of the source. Appending to a list is atomic."""
        self._seen[piece.file].append(Part(piece.offset, data.nbytes, crc32(data)))

    def _check_source(self) -> None:
        """The source's zip files have CRCs too: what was read must have them. Safetensors have none."""
        for record, parts in _by_record(self._source.records, self._seen):
            fd = self._reading.fd(record.file)
            if parts and (expected := read_crc(fd, record)) and whole_crc(fd, record, parts) != expected:
                raise InputError(
                    f"{record.file}: tensor {self._name_at(record)} is damaged (its checksum is another): copy it again"
                )

    def _name_at(self, record: Record) -> str:
        end = record.offset + record.nbytes
        for name in self._source.stored:
            for copy in self._source.locate(name).copies:
                if any(block.file == record.file and record.offset <= block.offset < end for block in copy):
                    return name
        return "of no name"

    def _write_checksums(self) -> None:
        """The target's zip files' CRCs, now that all parts of all records are known."""
        for record, parts in _by_record(self._target.records, self._parts):
            write_crc(self._writing.fd(record.file), record, combined_crc(record, parts))


def _by_record(records: Iterable[Record], parts: dict[Path, list[Part]]) -> Iterator[tuple[Record, list[Part]]]:
    """Each record with the parts of its file that begin in it, in order."""
    for in_file in parts.values():
        in_file.sort()
    for record in records:
        in_file = parts[record.file]
        first = bisect_left(in_file, (record.offset,))
        last = bisect_left(in_file, (record.offset + record.nbytes,))
        yield record, in_file[first:last]
