"""The file format: exact layout, atomic appearance, lazy reading, clear refusal."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, SequenceWriter, compress_row, sequence_files


def make_rows(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32000, (count, 3, length)).astype(np.int32)


def test_layout_is_the_format(tmp_path: Path) -> None:
    rows = make_rows(7, 33)
    with SequenceWriter(tmp_path / "a.h5", 33) as writer:
        writer.write(rows[:4])
        writer.write(rows[4:])
    with h5py.File(tmp_path / "a.h5") as file:  # through h5py alone: any reader must open it
        data = file["data"]
        assert list(file) == ["data"]
        assert data.shape == (7, 3, 33)
        assert data.dtype == np.dtype("<i4")
        assert data.chunks == (1, 3, 33)
        assert data.compression == "gzip"
        assert not data.shuffle
        assert file.attrs["n_examples"] == 7
        assert np.array_equal(data[:], rows)
    file_ = SequenceFile(tmp_path / "a.h5")
    assert (len(file_), file_.max_seq_length) == (7, 33)
    assert all(np.array_equal(file_[i], rows[i]) for i in range(7))
    assert np.array_equal(file_[-1], rows[-1])
    again = pickle.loads(pickle.dumps(file_))
    assert np.array_equal(again[3], rows[3])
    with pytest.raises(IndexError):
        file_[7]


def text_like_rows(count: int, length: int) -> np.ndarray:
    """Sequences as packing makes them: a few tokens very often, most seldom; labels are the next tokens."""
    stream = np.random.default_rng(1).zipf(1.3, count * length + 1) % 32000
    tokens, labels = stream[:-1].reshape(count, length), stream[1:].reshape(count, length)
    return np.stack([tokens, np.ones_like(tokens), labels], axis=1).astype(np.int32)


def digests(rows: np.ndarray, order: np.ndarray) -> list[str]:
    """The hash of each row's compressed bytes, compressed in this order."""
    found = {int(number): hashlib.blake2b(compress_row(rows[number])).hexdigest() for number in order}
    return [found[number] for number in range(len(rows))]


IN_A_FRESH_PROCESS = """
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("rows", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
rows = module.text_like_rows(int(sys.argv[2]), int(sys.argv[3]))
print(json.dumps(module.digests(rows, np.random.default_rng(int(sys.argv[4])).permutation(len(rows)))))
"""


@pytest.mark.parametrize(
    ("count", "length", "processes"), [(400, 512, 1), pytest.param(12_500, 2048, 8, marks=pytest.mark.slow)]
)
def test_same_bytes_in_every_process(count: int, length: int, processes: int) -> None:
    """A row's compressed bytes depend on the row alone: not on what the process compressed before, nor on the process.

    Planted: one compressor kept and flushed for all rows (zlib.compressobj, Z_SYNC_FLUSH) -> fails.
    """
    rows = text_like_rows(count, length)
    expected = digests(rows, np.arange(count))
    for seed in range(processes):
        command = [sys.executable, "-c", IN_A_FRESH_PROCESS, __file__, str(count), str(length), str(seed)]
        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        assert json.loads(output) == expected


def test_many_rows_and_no_rows(tmp_path: Path) -> None:
    rows = make_rows(2500, 8)
    with SequenceWriter(tmp_path / "many.h5", 8) as writer:
        writer.write(rows)
    with SequenceWriter(tmp_path / "none.h5", 8):
        pass
    assert np.array_equal(np.stack(list(SequenceFile(tmp_path / "many.h5").rows())), rows)
    assert len(SequenceFile(tmp_path / "none.h5")) == 0


def test_appears_when_complete(tmp_path: Path) -> None:
    """Planted: writing under the final name from the start -> a.h5 is there before its end, fails."""
    with SequenceWriter(tmp_path / "a.h5", 8) as writer:
        writer.write(make_rows(2, 8))
        assert [path.name for path in tmp_path.iterdir()] == ["a.h5.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    """Planted: renaming in __exit__ whatever the exception -> a.h5 appears, fails."""
    with pytest.raises(ZeroDivisionError), SequenceWriter(tmp_path / "a.h5", 8) as writer:
        writer.write(make_rows(2 // writer.num_rows, 8))
    with pytest.raises(InputError, match="rows are"), SequenceWriter(tmp_path / "a.h5", 8) as writer:
        writer.write(make_rows(2, 9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (3, 1, 4), "compression": "gzip"},  # the chunks h5py guesses, as in files of the reference's stage 3
        {"chunks": (1, 3, 16), "compression": "gzip", "shuffle": True},
        {"chunks": (1, 3, 16)},
        {},
    ],
)
def test_reads_other_layouts(tmp_path: Path, options: dict) -> None:
    rows = make_rows(9, 16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=rows, **options)
    source = SequenceFile(tmp_path / "a.h5")
    assert np.array_equal(np.stack(list(source.rows())), rows)
    with SequenceWriter(tmp_path / "b.h5", 16) as writer:
        writer.write_compressed(source.read_compressed(i) for i in range(9))
    assert np.array_equal(np.stack(list(SequenceFile(tmp_path / "b.h5").rows())), rows)


def test_reads_the_reference(shared: Path) -> None:
    for path in sequence_files(shared / "fixtures/data/out", recursive=True):
        with h5py.File(path) as file:
            expected = file["data"][:]
        assert np.array_equal(np.stack(list(SequenceFile(path).rows())), expected)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not hdf5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = np.zeros(3)
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["data"] = np.zeros((4, 2, 8), np.int32)
    for name, message in [
        ("missing.h5", "no such file"),
        ("text.h5", "not a readable HDF5"),
        ("other.h5", "no dataset 'data'"),
        ("flat.h5", r"\(4, 2, 8\)"),
    ]:
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            SequenceFile(tmp_path / name)
    with pytest.raises(InputError, match="no such"):
        sequence_files(tmp_path / "nowhere")


def test_files_are_sorted_and_complete_only(tmp_path: Path) -> None:
    for name in ("b.h5", "a.h5", "sub/c.h5"):
        with SequenceWriter(tmp_path / name, 4) as writer:
            writer.write(make_rows(1, 4))
    (tmp_path / "d.h5.partial").write_bytes(b"")
    assert [p.name for p in sequence_files(tmp_path)] == ["a.h5", "b.h5"]
    assert [p.name for p in sequence_files(tmp_path, recursive=True)] == ["a.h5", "b.h5", "c.h5"]
    assert sequence_files(tmp_path / "a.h5") == [tmp_path / "a.h5"]


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """As `split` leaves them when the folder is moved. Planted: passed over -> a folder with one file less, fails."""
    rows = make_rows(2, 8)
    for name in ("a", "b"):
        with SequenceWriter(tmp_path / f"rows/{name}.h5", 8) as writer:
            writer.write(rows)
    (tmp_path / "rows/c.h5").symlink_to("../gone/c.h5")
    with pytest.raises(InputError, match=r"rows/c\.h5: is a link to \.\./gone/c\.h5, which is not there"):
        sequence_files(tmp_path / "rows")
    (tmp_path / "rows/c.h5").unlink()
    assert len(sequence_files(tmp_path / "rows")) == 2


def test_sequences_without_positions(tmp_path: Path) -> None:
    """Planted: taken for sequences -> `verify` and `inspect` end in a traceback, fails."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = np.zeros((3, 3, 0), np.int32)
    with pytest.raises(InputError, match=r"'data' is int32 \(3, 3, 0\), not"):
        SequenceFile(tmp_path / "a.h5")
