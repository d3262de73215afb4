"""Concatenate and cut: every token once, the mask beside the position that predicts."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.chat_format import Encoded
from finetune.packing import PackedRows


def stream(rng: np.random.Generator, lengths: list[int]) -> list[Encoded]:
    return [Encoded(rng.integers(3, 900, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]


@pytest.mark.parametrize("lengths", [[40], [1, 5, 3, 32, 64, 2], [17] * 9, [33], [34]])
def test_rows_are_windows_of_the_stream(lengths: list[int]) -> None:
    """Planted: mask taken at t instead of t + 1 (shifted by one) -> the masks differ, fails."""
    documents = stream(np.random.default_rng(0), lengths)
    rows = PackedRows(documents, seq_length=32, pad_id=2)
    ids = np.concatenate([d.ids for d in documents])
    trained = np.concatenate([d.trained for d in documents])

    tokens, mask, labels = np.concatenate([rows[i] for i in range(len(rows))], axis=1)
    used = len(ids) - 1
    assert len(rows) == -(-used // 32)
    np.testing.assert_array_equal(tokens[:used], ids[:-1])
    np.testing.assert_array_equal(labels[:used], ids[1:])
    np.testing.assert_array_equal(mask[:used], trained[1:])
    assert not mask[used:].any()
    assert (labels[used:] == 2).all()
    assert rows[0].dtype == np.int32
    assert rows.num_trained_tokens == mask.sum()
    for row in (rows[i] for i in range(len(rows))):
        np.testing.assert_array_equal(row[0, 1:], row[2, :-1])


def test_no_row_without_a_prediction() -> None:
    assert len(PackedRows([], seq_length=8, pad_id=2)) == 0
    one = PackedRows([Encoded(np.array([1], np.int32), np.array([True]))], seq_length=8, pad_id=2)
    assert len(one) == 0
    with pytest.raises(IndexError):
        one[0]
