"""Stands in for the `deflate` package in an environment that was installed before it was required: zlib, slower."""

from __future__ import annotations

import zlib

DeflateError = zlib.error


def zlib_compress(data: memoryview, compresslevel: int) -> bytearray:
    """Deflate `data`."""
    return bytearray(zlib.compress(data, compresslevel))


def zlib_decompress(data: bytes, originalsize: int) -> bytearray:
    """Inflate `data` of `originalsize` bytes."""
    return bytearray(zlib.decompress(data, bufsize=originalsize))
