"""Bytes of a file, wherever it lies and however it is packed: local path or fsspec URL; plain, gzip or zstd.

A file that ends too early is an error here, never a short file: a truncated download must not pass for a small corpus.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard
from isal import igzip

from data_prep.errors import InputError, full_disk

READ_SIZE = 1 << 20


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path; unlike `Path.rglob` it does not pass over what it may not list.

    Links to nothing are among them: who wants to read one is told.

    Raises:
        InputError: a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    found = (Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL (s3://…, memory://…) and not a local path."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there.

    Raises:
        InputError: no such protocol, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be opened ({error}): install what fsspec needs for it") from None
    return system, path


def size_of(path: str) -> int | None:
    """Bytes of a file, None where a server does not tell.

    Raises:
        InputError: it is not there.
    """
    try:
        if not is_url(path):
            return os.path.getsize(path)
        system, there = filesystem(path)
        size: int | None = system.info(there).get("size")
        return size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


class ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames of a zstd stream.

    zstandard's own reader takes a cut-off last frame for the end of the file; this one raises EOFError.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        # 2 GiB windows, as written by `zstd --ultra --long=31`, are allowed.
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._source.read(READ_SIZE // 8)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("the last zstd frame is cut off")
                    return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """The unpacked bytes of `path` as a buffered binary stream; .gz and .zst are unpacked on the way.

    Raises:
        InputError: no such file, not allowed to read it, damaged or cut off (also while it is being read).
    """
    try:
        if is_url(path):
            system, there = filesystem(path)
            raw = cast(BinaryIO, system.open(there, "rb"))
        else:
            raw = Path(path).open("rb")  # noqa: SIM115 - closed by `with raw` below
        with raw:
            if path.endswith(".gz"):
                yield cast(BinaryIO, igzip.IGzipFile(fileobj=raw, mode="rb"))
            elif path.endswith(".zst"):
                yield cast(BinaryIO, io.BufferedReader(ZstdStream(raw), READ_SIZE))
            else:
                yield raw
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, zstandard.ZstdError, zlib.error, igzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged or cut off ({error}): fetch it again") from None
    except OSError as error:
        if full_disk(error):  # of what is written while this is open
            raise
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
