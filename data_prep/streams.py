"""Bytes of a file, wherever it lies and however it is packed: local path or fsspec URL; plain, gzip or zstd.

A file that ends too early is an error here, never a short file: a truncated download must not pass for a small corpus.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard
from isal import igzip

from data_prep.errors import InputError

READ_SIZE = 1 << 20


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL (s3://…, memory://…) and not a local path."""
    return "://" in path


class _ZstdStream(io.RawIOBase):
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
            import fsspec

            raw = cast(BinaryIO, fsspec.open(path, "rb").open())
        else:
            raw = Path(path).open("rb")  # noqa: SIM115 - closed by `with raw` below
        with raw:
            if path.endswith(".gz"):
                yield cast(BinaryIO, igzip.IGzipFile(fileobj=raw, mode="rb"))
            elif path.endswith((".zst", ".zst.tar")):
                yield cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), READ_SIZE))
            else:
                yield raw
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, zstandard.ZstdError, zlib.error, igzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged or cut off ({error}): fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
