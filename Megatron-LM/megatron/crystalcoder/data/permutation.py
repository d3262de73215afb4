"""A shuffle as arithmetic: where each position goes is computed, never stored.

A Feistel network over a domain of a x b >= n cells permutes the cells; a position that leaves [0, n) is sent through
again until it is back ("cycle walking"; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). So the
shuffled place of any position costs the same, takes no memory however many rows there are, and stays the same for ever:
only integer arithmetic is used, no library's random stream.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import isqrt

import numpy as np

_ROUNDS = 8


def permute(positions: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The places of `positions` (int64, each in [0, n)) in the permutation of range(n) that `key` selects."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    places = np.asarray(positions, dtype=np.int64)
    outside = np.arange(len(places))
    places = places.copy()
    while len(outside):
        places[outside] = _feistel(places[outside], a, b, _round_keys(key))
        outside = outside[places[outside] >= n]
    return places


def _feistel(cells: np.ndarray, a: int, b: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass over the a x b cells: each round adds a hash of one coordinate to the other, which can be undone."""
    high, low = cells // a, cells % a
    for number, round_key in enumerate(round_keys):
        if number % 2:
            high = (high + _hash(low, round_key, b)) % b
        else:
            low = (low + _hash(high, round_key, a)) % a
    return high * a + low


def _hash(values: np.ndarray, round_key: np.uint64, below: int) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), taken modulo `below`."""
    x = values.astype(np.uint64) ^ round_key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(below)).astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
