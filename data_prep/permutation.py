"""A random order of n things that no one has to hold in memory."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8


class Permutation:
    """A random permutation of 0 … n - 1, computable at any place without a table.

    A Feistel network whose rounds are keyed by the seed (after Black and Rogaway 2002) permutes 2^(2k) ≥ n numbers; one
    that lands at n or beyond is sent through again until it does not (at most four times on average), which leaves a
    permutation of the first n.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(f"{seed}/{size}".encode(), digest_size=ROUNDS * 8).digest()
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Where each of `numbers` goes, int (m,) -> int64 (m,)."""
        values = self._network(numbers.astype(np.uint64))
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
