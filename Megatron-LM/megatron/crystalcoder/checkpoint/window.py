"""Bytes of a file, or of a part of one, wherever it is: read at any place, and a file object of their own."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Window(io.RawIOBase):
    """Bytes that are read at any place, as a file of their own. size: how many there are."""

    size: int

    def __init__(self) -> None:
        self._position = 0

    def at(self, offset: int, length: int) -> bytes:
        """So many bytes from there, fewer at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        if self._position < 0:
            raise OSError("before the start")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class FileWindow(Window):
    """Part of an open file."""

    def __init__(self, fd: int, start: int = 0, length: int | None = None) -> None:
        super().__init__()
        self._fd, self._start = fd, start
        self.size = os.fstat(fd).st_size - start if length is None else length

    def at(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, max(0, min(length, self.size - offset)), self._start + offset)

    def readinto(self, buffer: Any) -> int:
        """As `Window`'s, without a copy in between."""
        room = memoryview(buffer)[: max(0, self.size - self._position)]
        count = os.preadv(self._fd, [room], self._start + self._position) if len(room) else 0
        self._position += count
        return count


@contextmanager
def opened(file: Path, start: int = 0, length: int | None = None) -> Iterator[Window]:
    """A file on disk. start, length: of the part that counts."""
    with file.open("rb") as stream:
        yield FileWindow(stream.fileno(), start, length)
