"""The HDF5 sequence format: the one file format between text and training.

A file holds one dataset `data`, int32 little-endian, shape (n, 3, msl): n sequences of msl positions, with the planes
0 = token ids, 1 = loss mask (0 or 1), 2 = labels (the token that follows each position). Chunks are one sequence,
(1, 3, msl), compressed with HDF5's gzip filter; the root attribute `n_examples` is n. Any HDF5 reader opens it. Beside
`data` a file may say which documents each sequence came from (provenance.py).

Chunks are deflated and inflated outside the HDF5 library, by libdeflate, and written and read directly: several times
faster than h5py's ordinary path, and nothing of it shows in the format.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import deflate
import h5py
import numpy as np

from data_prep.errors import InputError, full_disk
from data_prep.provenance import ProvenanceReader, ProvenanceWriter, Span, SpanTable, read_provenance

PLANES = 3  # token ids, loss mask, labels
SUFFIX = ".h5"
# Level recorded in the file (the format's own); the bytes are any valid deflate stream. libdeflate's level 1 takes half
# the time of zlib's level 1 for 5 % less room, and packs the same row into the same bytes in every process and on every
# kind of CPU, which faster ones (ISA-L, zlib-ng) do not promise: their code paths differ from one CPU to the next.
GZIP_LEVEL = 4
DEFLATE_LEVEL = 1
ROW_DTYPE = np.dtype("<i4")
CHECKSUM_RANGE = 1 << 64


def compress_row(row: np.ndarray) -> bytes:
    """Deflate one (3, msl) int32 sequence as HDF5's gzip filter would."""
    return bytes(deflate.zlib_compress(np.ascontiguousarray(row, ROW_DTYPE).data, DEFLATE_LEVEL))


def row_checksum(chunk: bytes) -> int:
    """Checksum of one deflated sequence. A file's checksum is the sum over its rows, so their order does not matter."""
    return int.from_bytes(hashlib.blake2b(chunk, digest_size=8).digest(), "little")


class Checksums:
    """Of a file's rows, one after another: `checksum` whatever their order, and `order` for that."""

    def __init__(self) -> None:
        self._sum = 0
        self._order = hashlib.blake2b(digest_size=8)

    def add(self, chunk: bytes) -> None:
        """The next row, deflated."""
        number = row_checksum(chunk)
        self._sum += number
        self._order.update(number.to_bytes(8, "little"))

    @property
    def summary(self) -> dict[str, str]:
        """As a manifest has them."""
        return {"checksum": f"{self._sum % CHECKSUM_RANGE:016x}", "order": self._order.hexdigest()}


class SequenceWriter:
    """Write one sequence file; it appears under its name only when it is complete.

    Use as a context manager: leaving it normally renames `<path>.partial` to `path`, leaving it by an exception deletes
    it. Rows may come in any number of calls, so memory stays at one call's rows.

    Raises:
        InputError: rows of another shape than (k, 3, max_seq_length), or the folder cannot be written.
    """

    def __init__(self, path: str | Path, max_seq_length: int) -> None:
        if max_seq_length < 1:
            raise InputError(f"{path}: max_seq_length must be at least 1, not {max_seq_length}")
        self.path = Path(path)
        self.max_seq_length = max_seq_length
        self.num_rows = 0
        self._capacity = 0
        self._checksums = Checksums()
        self._documents: str | None = None  # checksum of the provenance, where it is known
        self._provenance = ProvenanceWriter()
        self._partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self._partial, "w")
        except OSError as error:
            with suppress(OSError):
                self._partial.unlink()
            if full_disk(error):
                raise
            raise InputError(f"{self.path}: cannot be written ({_first_line(error)}): choose another --out") from None
        self._dataset = self._file.create_dataset(
            "data",
            shape=(0, PLANES, max_seq_length),
            maxshape=(None, PLANES, max_seq_length),
            dtype=ROW_DTYPE,
            chunks=(1, PLANES, max_seq_length),
            compression="gzip",
            compression_opts=GZIP_LEVEL,
        )

    def write(self, rows: np.ndarray, spans: Sequence[Sequence[Span]] | None = None) -> None:
        """Append rows, int array of shape (k, 3, max_seq_length), and where they came from, if that is known.

        Spans are kept for all rows of a file or for none.
        """
        if rows.ndim != 3 or rows.shape[1:] != (PLANES, self.max_seq_length):
            raise InputError(f"{self.path}: rows are {rows.shape}, the file holds (k, 3, {self.max_seq_length})")
        self._provenance.append(spans or ())
        self.write_compressed(map(compress_row, rows))

    def write_compressed(self, chunks: Iterable[bytes], spans: SpanTable | None = None) -> None:
        """Append rows that are deflated already (from `compress_row` or `SequenceFile.compressed`)."""
        if spans is not None:
            self._provenance.extend(spans)
        write_chunk = self._dataset.id.write_direct_chunk
        number = self.num_rows
        for chunk in chunks:
            if number == self._capacity:
                self._capacity = max(1024, 2 * number)
                self._dataset.resize(self._capacity, axis=0)
            write_chunk((number, 0, 0), chunk)
            self._checksums.add(chunk)
            number += 1
        self.num_rows = number

    @property
    def summary(self) -> dict[str, object]:
        """What a manifest records of a closed file: its rows, their checksums and that of their documents."""
        documents = {"documents": self._documents} if self._documents else {}
        return {"rows": self.num_rows, **self._checksums.summary, **documents}

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._dataset.resize(self.num_rows, axis=0)
        self._file.attrs["n_examples"] = self.num_rows
        if self.num_rows and self._provenance.num_rows == self.num_rows:
            self._documents = self._provenance.save(self._file).digest
        self._file.close()
        os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Delete what was written; the name stays as it was."""
        with suppress(OSError, RuntimeError):  # on a full disk it cannot be written to its end either
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> SequenceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self.discard()
            raise
        if kind is not None:
            self.discard()


class SequenceFile:
    """Read one sequence file lazily: `len(file)`, `file[i]` -> (3, msl) int32, `file.max_seq_length`.

    The HDF5 handle is opened on first use and anew in each process (a handle that crosses a fork corrupts silently),
    and is not pickled. Files with other chunk shapes or filters are read through h5py's ordinary path.

    Raises:
        InputError: not an HDF5 file, no dataset `data`, another shape or dtype, an unreadable row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._process = -1
        self._provenance: tuple[ProvenanceReader | None] | None = None  # () around it: read, there is none
        self._open()

    def _open(self) -> h5py.Dataset:
        if self._file is None or self._process != os.getpid():
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                what = "no such file" if not self.path.exists() else f"not a readable HDF5 file ({_first_line(error)})"
                raise InputError(f"{self.path}: {what}: prepare it with `crystalcoder data tokenize`") from None
            self._process = os.getpid()
            dataset = self._file.get("data")
            if not isinstance(dataset, h5py.Dataset):
                raise InputError(f"{self.path}: has no dataset 'data': is it a file of sequences?")
            if (
                dataset.ndim != 3
                or dataset.shape[1] != PLANES
                or not dataset.shape[2]
                or dataset.dtype.kind not in "iu"
            ):
                raise InputError(
                    f"{self.path}: 'data' is {dataset.dtype} {dataset.shape}, not int32 (n, 3, max_seq_length)"
                )
            self._dataset = dataset
            self.max_seq_length = int(dataset.shape[2])
            # The direct path needs exactly the layout that SequenceWriter writes.
            self.is_direct = (
                dataset.chunks == (1, PLANES, self.max_seq_length)
                and dataset.dtype == ROW_DTYPE
                and dataset.compression == "gzip"
                and not (dataset.shuffle or dataset.fletcher32)
                and sys.byteorder == "little"
            )
        return self._dataset

    def __len__(self) -> int:
        return int(self._open().shape[0])

    def __getitem__(self, index: int) -> np.ndarray:
        """One sequence, int32 (3, msl)."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"{self.path}: row {index} of {length}")
        index %= length
        if not self.is_direct:
            try:
                row: np.ndarray = self._open()[index].astype(ROW_DTYPE, copy=False)
            except OSError as error:
                raise InputError(f"{self.path}: row {index} cannot be read ({_first_line(error)})") from None
            return row
        return self._inflate(index, self.read_compressed(index))

    def read_compressed(self, index: int) -> bytes:
        """One sequence as it lies in the file, deflated; `SequenceWriter.write_compressed` takes it as it is."""
        if not self.is_direct:
            return compress_row(self[index])
        try:
            mask, chunk = self._open().id.read_direct_chunk((index, 0, 0))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path}: row {index} cannot be read ({_first_line(error)})") from None
        if mask:  # HDF5 leaves a filter out for a chunk that does not shrink
            return compress_row(np.frombuffer(chunk, ROW_DTYPE).reshape(PLANES, self.max_seq_length))
        return bytes(chunk)

    def compressed(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """`read_compressed` of the sequences from `start` up to `stop`, several times faster."""
        stop = len(self) if stop is None else stop
        if not self.is_direct or self._open().file.userblock_size:
            yield from map(self.read_compressed, range(start, stop))
            return
        # HDF5 walks its index of chunks for each one it is asked for. Walk it once, and read from the file itself.
        places = np.zeros((len(self), 3), np.int64)  # where, how long, whether as it is

        def note(chunk: Any) -> None:
            places[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size, chunk.filter_mask == 0

        try:
            self._open().id.chunk_iter(note)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: rows cannot be read ({_first_line(error)})") from None
        with self.path.open("rb", buffering=0) as file:
            handle = file.fileno()
            for index, (offset, size, is_plain) in enumerate(places[start:stop].tolist(), start):
                chunk = os.pread(handle, size, offset) if is_plain else b""
                yield chunk if len(chunk) == size and is_plain else self.read_compressed(index)

    def _inflate(self, index: int, chunk: bytes) -> np.ndarray:
        size = PLANES * self.max_seq_length * ROW_DTYPE.itemsize
        try:
            plain = deflate.zlib_decompress(chunk, size)
        except deflate.DeflateError:
            plain = bytearray()
        if len(plain) != size:
            raise InputError(f"{self.path}: row {index} is damaged (it does not inflate): prepare the file again")
        return np.frombuffer(plain, ROW_DTYPE).reshape(PLANES, self.max_seq_length)  # of a bytearray: may be written to

    def spans(self, index: int) -> list[Span] | None:
        """The documents of one sequence, in the order of its tokens; None if the file does not say."""
        reader = self._read_provenance()
        return reader[index] if reader else None

    def span_table(self) -> SpanTable | None:
        """The documents of all sequences; None if the file does not say."""
        reader = self._read_provenance()
        return reader.table if reader else None

    def _read_provenance(self) -> ProvenanceReader | None:
        self._open()
        if self._provenance is None:
            assert self._file is not None
            try:
                self._provenance = (read_provenance(self._file),)
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                reason = f"{self.path}: its provenance cannot be read ({_first_line(error)}): prepare the file again"
                raise InputError(reason) from None
        return self._provenance[0]

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The sequences from `start` up to `stop`, one at a time."""
        stop = len(self) if stop is None else stop
        if self.is_direct:
            yield from map(self._inflate, range(start, stop), self.compressed(start, stop))
        else:
            yield from map(self.__getitem__, range(start, stop))

    def rows_and_chunks(self) -> Iterator[tuple[np.ndarray, bytes]]:
        """All sequences, one at a time, each with its deflated bytes: who does not change it need not deflate it."""
        for index, chunk in enumerate(self.compressed()):
            yield self._inflate(index, chunk), chunk

    def close(self) -> None:
        """Let go of the HDF5 handle; the next access opens it again."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __enter__(self) -> SequenceFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def sequence_files(path: str | Path, *, recursive: bool = False) -> list[Path]:
    """The sequence files at `path` (a file, or a folder's `*.h5`), sorted by path: the order never depends on the disk.

    Raises:
        InputError: nothing there, or a link to nothing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder of {SUFFIX} sequence files")
    files = sorted(p for p in (path.rglob("*" + SUFFIX) if recursive else path.glob("*" + SUFFIX)) if _is_there(p))
    if not files:
        below = " (there are some in folders below it: name those)" if any(path.rglob("*" + SUFFIX)) else ""
        raise InputError(f"{path}: holds no {SUFFIX} sequence files{below}")
    return files


def _is_there(path: Path) -> bool:
    """Whether a path that a folder lists is a file.

    Raises:
        InputError: it is a link to nothing, which must not pass for one file less.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: is a link to {path.readlink()}, which is not there: make it again, or remove it")
    return path.is_file()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
