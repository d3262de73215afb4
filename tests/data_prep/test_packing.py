"""Packing loses nothing: the stream of documents comes back, every token but the first is predicted once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import Packer, stream_of, unpack
from data_prep.sequences import SequenceFile

BOS, EOS = 1, 2
bodies = st.lists(st.lists(st.integers(3, 50), max_size=40), max_size=12)


def pack(bodies: list[list[int]], length: int) -> np.ndarray:
    packer = Packer(length, pad_id=EOS)
    rows = [packer.add(np.array([BOS, *body, EOS], np.int32)) for body in bodies]
    return np.concatenate([*rows, packer.finish()])


@settings(max_examples=100, deadline=None)
@given(bodies=bodies, length=st.integers(2, 50))
def test_nothing_is_lost(bodies: list[list[int]], length: int) -> None:
    """Planted: labels = stream[:end] (no shift) fails; mask one too long on the padded row fails; no `finish` fails."""
    rows = pack(bodies, length)
    stream = np.array([token for body in bodies for token in (BOS, *body, EOS)], np.int32)
    assert rows.dtype == np.int32
    assert rows.shape[1:] == (3, length)
    tokens, mask, labels = rows[:, 0].ravel(), rows[:, 1].ravel(), rows[:, 2].ravel()
    count = max(0, len(stream) - 1)
    assert len(rows) == -(-count // length)
    assert np.array_equal(mask, np.arange(len(mask)) < count)
    assert np.array_equal(tokens[:count], stream[:-1])
    assert np.array_equal(labels[:count], stream[1:])
    assert (tokens[count:] == EOS).all()
    assert (labels[count:] == EOS).all()
    assert [list(d) for d in unpack(iter(rows), EOS)] == [[BOS, *body, EOS] for body in bodies]
    for row in rows:
        n = row[1].sum()
        assert np.array_equal(stream_of(row), np.append(row[0, :n], row[2, n - 1]))


def test_rows_do_not_depend_on_when_documents_come() -> None:
    long = [[*range(3, 3 + n % 40)] for n in range(0, 4000, 7)]
    packer, one = Packer(64, EOS), pack(long, 64)
    stream = np.array([t for body in long for t in (BOS, *body, EOS)], np.int32)
    assert np.array_equal(np.concatenate([packer.add(stream), packer.finish()]), one)


def test_documents_of_the_reference_are_found(shared) -> None:
    """Its windows hold the same kind of stream: 28 CSS documents, the last cut where the reference drops the tail."""
    rows = SequenceFile(shared / "fixtures/data/out/tok/s3_2048_css/examples_0_0.h5").rows()
    documents = list(unpack(rows, EOS))
    assert all(d[0] == BOS for d in documents)
    assert all(d[-1] == EOS for d in documents[:-1])
