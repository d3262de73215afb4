"""Concatenate and cut: every token once, the mask beside the position that predicts."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.chat_format import Encoded
from finetune.packing import BestFitRows, PackedRows, Part, best_fit


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
    assert mask.sum() == trained[1:].sum()
    for row in (rows[i] for i in range(len(rows))):
        np.testing.assert_array_equal(row[0, 1:], row[2, :-1])


def test_no_row_without_a_prediction() -> None:
    assert len(PackedRows([], seq_length=8, pad_id=2)) == 0
    one = PackedRows([Encoded(np.array([1], np.int32), np.array([True]))], seq_length=8, pad_id=2)
    assert len(one) == 0
    with pytest.raises(IndexError):
        one[0]


def test_parts_say_which_documents_a_row_holds() -> None:
    rows = PackedRows(stream(np.random.default_rng(1), [3, 40, 2, 30]), seq_length=32, pad_id=2)
    assert [rows.parts(i) for i in range(3)] == [
        [Part(0, 0), Part(1, 0)],
        [Part(1, 29), Part(2, 0), Part(3, 0)],
        [Part(3, 19)],
    ]


def test_best_fit_rows_hold_each_document_whole(tmp_path) -> None:
    """Planted: the room left not updated -> a row overflows, fails; mask not shifted -> the masks differ, fails."""
    rng = np.random.default_rng(2)
    documents = stream(rng, rng.integers(1, 65, 500).tolist())
    rows = BestFitRows(documents, seq_length=64, pad_id=2)
    seen = []
    for number in range(len(rows)):
        tokens, mask, labels = rows[number]
        at = 0
        for index, start in rows.parts(number):
            assert start == 0
            ids, trained = documents[index]
            end = at + len(ids)
            np.testing.assert_array_equal(tokens[at:end], ids)
            np.testing.assert_array_equal(labels[at : end - 1], ids[1:])
            np.testing.assert_array_equal(mask[at : end - 1], trained[1:])
            assert (mask[end - 1], labels[end - 1]) == (0, 2)
            seen.append(index)
            at = end
        assert (tokens[at:] == 2).all()
        assert not mask[at:].any()
    assert sorted(seen) == list(range(500))
    assert rows.num_tokens / (len(rows) * 64) > 0.97


def test_best_fit_is_the_plain_algorithm() -> None:
    """Against a search through all rows."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths = rng.integers(1, 101, 200).tolist()
        rooms: list[int] = []
        held: list[list[int]] = []
        for number in sorted(range(200), key=lambda i: -lengths[i]):
            fitting = [room for room in rooms if room >= lengths[number]]
            if fitting:
                row = max(i for i, room in enumerate(rooms) if room == min(fitting))
            else:
                row = len(rooms)
                rooms.append(100)
                held.append([])
            rooms[row] -= lengths[number]
            held[row].append(number)
        ours = best_fit(lengths, 100)
        assert sorted(sum(lengths[i] for i in row) for row in ours) == sorted(100 - room for room in rooms)
    with pytest.raises(ValueError, match="101 tokens does not fit into a row of 100"):
        best_fit([101], 100)


def test_best_fit_takes_time_linear_in_the_documents() -> None:
    """Counted, not timed: each document costs a bounded number of steps, so 200,000 of them are done in a moment."""
    lengths = np.random.default_rng(4).integers(1, 2049, 200_000)
    rows = best_fit(lengths, 2048)
    assert sum(map(len, rows)) == 200_000
    assert lengths.sum() / (len(rows) * 2048) > 0.999
