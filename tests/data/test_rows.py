"""Rows from both formats: the values, and one line for every way a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.data.rows import Rows, open_rows
from support.sequence_rows import S, V, as_objects, make_rows, write_h5, write_jsonl


def opened(*paths: Path, seq_length: int = S, vocab_size: int = V) -> Rows:
    return open_rows(paths, seq_length=seq_length, vocab_size=vocab_size)


def contents(rows: Rows) -> np.ndarray:
    return np.stack([rows[i] for i in range(len(rows))])


def test_both_formats_give_the_same_rows_in_the_order_of_the_files(tmp_path: Path) -> None:
    """JSONL, HDF5 and directories of them mixed: values, order and dtype; a row is written nowhere but read as it is.

    Planted: labels rolled by one in `_checked`; the keys of mask and labels swapped: both fail.
    """
    data = make_rows(25)
    folder = tmp_path / "part"
    folder.mkdir()
    write_h5(folder / "b.h5", data[10:20])
    write_h5(folder / "a.h5", data[5:10])
    first, last = write_jsonl(tmp_path / "x.jsonl", as_objects(data[:5])), write_h5(tmp_path / "z.h5", data[20:])
    rows = opened(first, folder, last)
    assert len(rows) == 25
    assert rows[0].dtype == np.int32
    assert np.array_equal(contents(rows), data)
    for index in (24, 3, 11, 5, 0):
        assert np.array_equal(rows[index], data[index])
    with pytest.raises(IndexError):
        rows[25]


def test_labels_and_mask_are_not_shifted(tmp_path: Path) -> None:
    """The label of position t is the token of t + 1, and the mask stays where the file has it."""
    data = make_rows(4)
    for path in (write_jsonl(tmp_path / "x.jsonl", as_objects(data)), write_h5(tmp_path / "x.h5", data)):
        tokens, mask, labels = contents(opened(path)).transpose(1, 0, 2)
        assert np.array_equal(labels[:, :-1], tokens[:, 1:])
        assert np.array_equal(mask, data[:, 1])


def test_the_reference_sample_is_read(shared: Path) -> None:
    """100 published rows of 2048: labels follow tokens; the mask's sums are the published ones."""
    rows = contents(opened(shared / "data/instruct_sample_100.jsonl", seq_length=2048, vocab_size=32032))
    assert rows.shape == (100, 3, 2048)
    assert np.array_equal(rows[:, 2, :-1], rows[:, 0, 1:])
    sums = rows[:, 1].sum(axis=1)
    assert (sums.min(), sums.max(), sums.mean(), sums[87]) == (3, 2048, 1520.75, 3)


def test_jsonl_takes_blank_lines_other_keys_and_masks_of_floats(tmp_path: Path) -> None:
    data = make_rows(3)
    objects = as_objects(data)
    objects[1]["loss_mask"] = [float(x) for x in objects[1]["loss_mask"]]
    objects[2]["source"] = "somewhere"
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(json.dumps(item) for item in objects))  # and no newline at the end
    assert np.array_equal(contents(opened(path)), data)


JSONL_FAULTS = {
    "cut short": (lambda text: text[:-20], r"x.jsonl:3: not valid JSON .*the file ends amid this row"),
    "malformed": (lambda text: text.replace("}", "]", 1), r"x.jsonl:1: not valid JSON"),
    "not an object": (lambda text: "[1, 2]\n" + text, r"x.jsonl:1: a row is an object"),
    "nothing": (lambda text: "\n", "no rows"),
}
ROW_FAULTS = {
    "missing key": ("loss_mask", None, "no loss_mask"),
    "short": ("label_ids", [1] * (S - 1), f"label_ids has {S - 1} entries where rows of {S}"),
    "id too large": ("token_ids", [V] * S, f"token_ids holds {V} at position 0, outside the vocabulary of {V}"),
    "id negative": ("label_ids", [1] * (S - 1) + [-1], f"label_ids holds -1 at position {S - 1}"),
    "id beyond 64 bits": ("token_ids", [2**64 - 1] * S, "outside the vocabulary"),
    "id not integer": ("token_ids", [1.5] * S, "token_ids holds numbers that are not integers"),
    "mask of 2": ("loss_mask", [0, 1, 2] + [0] * (S - 3), "loss_mask holds 2 at position 2"),
    "mask of 0.5": ("loss_mask", [0.5] * S, "loss_mask holds 0.5"),
    "text": ("token_ids", ["1"] * S, "token_ids is not a list of numbers"),
    "null": ("loss_mask", [None] * S, "loss_mask is not a list of numbers"),
    "nested": ("label_ids", [[1], [2, 3]], "label_ids is not a list of numbers"),
    "a number": ("token_ids", 5, "token_ids is not a list of numbers"),
}


@pytest.mark.parametrize("fault", JSONL_FAULTS)
def test_a_broken_jsonl_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    spoil, message = JSONL_FAULTS[fault]
    path = write_jsonl(tmp_path / "x.jsonl", as_objects(make_rows(3)))
    path.write_text(spoil(path.read_text()))
    with pytest.raises(InputError, match=message):
        opened(path)


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_wrong_row_is_refused_when_the_file_is_opened(tmp_path: Path, fault: str) -> None:
    """The message names file, line and key. Planted: `ids > vocab_size` in place of >=: fails."""
    key, value, message = ROW_FAULTS[fault]
    objects = as_objects(make_rows(5))
    del objects[3][key]
    if value is not None:
        objects[3][key] = value
    with pytest.raises(InputError, match=rf"x\.jsonl:4: .*{message}") as caught:
        opened(write_jsonl(tmp_path / "x.jsonl", objects))
    assert "\n" not in str(caught.value)


def test_a_wrong_hdf5_file_is_refused(tmp_path: Path) -> None:
    """No `data`, another length, ids beyond the vocabulary: when opened; damage in between: when the row is read."""
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(InputError, match=r"none\.h5.*data"):
        opened(tmp_path / "none.h5")
    data = make_rows(9)
    path = write_h5(tmp_path / "x.h5", data)
    with pytest.raises(InputError, match=r"x\.h5: sequences of 8 tokens where rows of 16"):
        opened(path, seq_length=16)
    with pytest.raises(InputError, match=r"x\.h5 row \d: .*outside the vocabulary of 10"):
        opened(path, vocab_size=10)
    for plane, value, message in (
        (0, V, "token_ids holds 50"),
        (1, 2, "loss_mask holds 2"),
        (2, -1, "label_ids holds -1"),
    ):
        spoilt = data.copy()
        spoilt[2, plane, 5] = value
        rows = opened(write_h5(tmp_path / f"spoilt{plane}.h5", spoilt))
        rows[1]
        with pytest.raises(InputError, match=rf"spoilt{plane}\.h5 row 2: {message} at position 5"):
            rows[2]


def test_places_without_rows_are_refused(tmp_path: Path) -> None:
    """A directory without rows, a missing path, another format, an HDF5 file of no rows, no path at all."""
    (tmp_path / "x.parquet").touch()
    write_h5(tmp_path / "empty.h5", make_rows(0))
    empty = tmp_path / "empty"
    empty.mkdir()
    for paths, message in (
        ([empty], "no .h5 or .jsonl"),
        ([tmp_path / "nowhere.h5"], "no such file"),
        ([tmp_path / "x.parquet"], ".h5 and .jsonl"),
        ([tmp_path / "empty.h5"], "no rows"),
        ([], "no data"),
    ):
        with pytest.raises(InputError, match=message):
            opened(*paths)


def test_the_fingerprint_follows_the_rows_not_the_names(tmp_path: Path) -> None:
    """Planted: the path in the digest: fails."""
    data = make_rows(6)
    one, two = write_jsonl(tmp_path / "a.jsonl", as_objects(data)), write_h5(tmp_path / "b.h5", data)
    prints = [opened(one).fingerprint(), opened(two).fingerprint(), opened(one, two).fingerprint()]
    prints += [opened(two, one).fingerprint(), opened(write_h5(tmp_path / "c.h5", data[:5])).fingerprint()]
    assert len(set(prints)) == 5
    os.rename(one, tmp_path / "moved.jsonl")
    assert opened(tmp_path / "moved.jsonl").fingerprint() == prints[0]


def _sum_of_rows(rows: Rows, indices: list[int]) -> int:
    return int(sum(rows[i].astype(np.int64).sum() for i in indices))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_may_read(tmp_path: Path, start: str) -> None:
    """A `Rows` that was read from before a fork, or pickled, gives the same rows in many processes at once."""
    data = make_rows(200)
    rows = opened(write_h5(tmp_path / "x.h5", data[:100]), write_jsonl(tmp_path / "y.jsonl", as_objects(data[100:])))
    assert np.array_equal(pickle.loads(pickle.dumps(rows))[7], data[7])
    rows[0], rows[150]
    parts = [list(range(k, 200, 2)) for k in range(2)]
    with get_context(start).Pool(2) as pool:
        sums = pool.starmap(_sum_of_rows, [(rows, part) for part in parts])
    assert sums == [int(data[k::2].astype(np.int64).sum()) for k in range(2)]


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """Handles are let go: 300 files read back and forth keep no more than 256 open."""
    data = make_rows(300)
    for number in range(300):
        write_h5(tmp_path / f"{number:03d}.h5", data[number : number + 1])
    rows = opened(tmp_path)
    for index in [*range(300), *reversed(range(300))]:
        assert np.array_equal(rows[index], data[index])
    held = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)]
    assert len(held) <= 256


def test_a_batch_is_its_rows_and_names_the_wrong_one(tmp_path: Path) -> None:
    """Rows of both formats in one batch; an id or a mask out of range on either side is found among them.

    Planted: signed comparison (a negative id passes); ids looked at in plane 0 alone: each fails."""
    data = make_rows(30)
    files = write_h5(tmp_path / "x.h5", data[:20]), write_jsonl(tmp_path / "y.jsonl", as_objects(data[20:]))
    numbers = [29, 0, 19, 20, 5]
    batch = opened(*files).batch(numbers)
    assert batch.dtype == np.int32
    assert np.array_equal(batch, data[numbers])
    for plane, value in ((0, V), (0, -1), (2, V), (2, -1), (1, 2), (1, -1)):
        wrong = data[:20].copy()
        wrong[7, plane, 3] = value
        rows = opened(write_h5(tmp_path / f"{plane}_{value}.h5", wrong))
        with pytest.raises(InputError, match=rf"row 7: \w+ holds {value}"):
            rows.batch([6, 7, 8])
