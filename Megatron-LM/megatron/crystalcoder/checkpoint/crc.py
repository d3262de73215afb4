"""CRC-32 of a record whose parts were written in any order: the parts' checksums combined (zlib's crc32_combine)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from isal.isal_zlib import crc32

from megatron.crystalcoder.checkpoint.tensor_files import Record

__all__ = ["Part", "combined_crc", "crc32", "read_crc", "whole_crc", "write_crc"]

_CHUNK_BYTES = 4 << 20
_POLYNOMIAL = 0xEDB88320  # CRC-32's, bits reversed
Matrix = tuple[int, ...]  # 32 columns over GF(2)


class Part(NamedTuple):
    """Bytes [offset, offset + nbytes) of a file and their CRC-32."""

    offset: int
    nbytes: int
    crc: int


def combined_crc(record: Record, parts: Iterable[Part]) -> int:
    """CRC-32 of a whole record; what no part covers is zeros. Parts must not overlap."""
    crc, position = 0, record.offset
    for part in sorted(parts):
        assert part.offset >= position, "parts of a record overlap"
        crc = _after_zeros(crc, part.offset - position)
        crc = _append(crc, part.crc, part.nbytes)
        position = part.offset + part.nbytes
    return _after_zeros(crc, record.offset + record.nbytes - position)


def write_crc(fd: int, record: Record, crc: int) -> None:
    """Put a record's checksum at its places in the zip file."""
    for place in record.crc_at:
        os.pwrite(fd, crc.to_bytes(4, "little"), place)


def read_crc(fd: int, record: Record) -> int:
    """The checksum that the zip file has of a record; 0 where torch was told to leave it out."""
    return int.from_bytes(os.pread(fd, 4, record.crc_at[0]), "little")


def whole_crc(fd: int, record: Record, parts: Iterable[Part]) -> int:
    """CRC-32 of a whole record of which `parts` have been read; the rest is read now. Parts may overlap."""
    apart, position = [], record.offset
    for part in (*sorted(parts), Part(record.offset + record.nbytes, 0, 0)):
        if part.offset < position:
            continue  # seen already, or read below
        while position < part.offset:
            data = os.pread(fd, min(_CHUNK_BYTES, part.offset - position), position)
            if not data:
                return -1  # cut short
            apart.append(Part(position, len(data), crc32(data)))
            position += len(data)
        if part.nbytes:
            apart.append(part)
        position = part.offset + part.nbytes
    return combined_crc(record, apart)


def _append(first: int, second: int, second_nbytes: int) -> int:
    """CRC of two byte strings one after the other, from theirs."""
    return _times(_zeros_matrix(second_nbytes), first) ^ second


def _after_zeros(crc: int, nbytes: int) -> int:
    return _append(crc, _zeros_crc(nbytes), nbytes) if nbytes else crc


@lru_cache(maxsize=4096)
def _zeros_crc(nbytes: int) -> int:
    """CRC of `nbytes` zero bytes: the inner register starts at all ones, and its complement is the checksum."""
    return _times(_zeros_matrix(nbytes), 0xFFFFFFFF) ^ 0xFFFFFFFF


@lru_cache(maxsize=4096)
def _zeros_matrix(nbytes: int) -> Matrix:
    """What feeding `nbytes` zero bytes does to the register, by repeated squaring."""
    result, power = _power(0, identity=True), 0
    while nbytes >> power:
        if nbytes >> power & 1:
            result = _product(_power(power), result)
        power += 1
    return result


@lru_cache(maxsize=128)
def _power(exponent: int, identity: bool = False) -> Matrix:
    """The matrix of 2^exponent zero bytes."""
    if identity:
        return tuple(1 << bit for bit in range(32))
    if exponent == 0:
        bit = (_POLYNOMIAL, *(1 << i for i in range(31)))  # one zero bit: shift right, fold the bit that falls out
        byte = bit
        for _ in range(7):
            byte = _product(bit, byte)
        return byte
    half = _power(exponent - 1)
    return _product(half, half)


def _product(left: Matrix, right: Matrix) -> Matrix:
    return tuple(_times(left, column) for column in right)


def _times(matrix: Matrix, vector: int) -> int:
    total, index = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[index]
        vector >>= 1
        index += 1
    return total
