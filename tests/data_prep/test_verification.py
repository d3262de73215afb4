"""`verify` finds what is wrong, each fault planted in turn, and nothing where nothing is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, SequenceWriter
from data_prep.shuffle import shuffle
from data_prep.verification import faults_of, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished shuffle of 40 sequences in two files."""
    stream = np.random.default_rng(0).integers(3, 100, 40 * 16 + 1).astype(np.int32)
    rows = np.ones((40, 3, 16), np.int32)
    rows[:, 0], rows[:, 2] = stream[:-1].reshape(40, 16), stream[1:].reshape(40, 16)
    rows[-1, 1, 5:] = 0
    with SequenceWriter(tmp_path / "in/a.h5", 16) as writer:
        writer.write(rows)
    shuffle([tmp_path / "in"], tmp_path / "out", files=2, seed=0)
    return tmp_path / "out"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    rows = change(np.stack(list(SequenceFile(path).rows())))
    with SequenceWriter(path, rows.shape[2]) as writer:
        writer.write(rows)


def test_nothing_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder) == []
    assert verify(folder / "data-00000.h5", 100) == []
    main(["verify", str(folder)])
    assert "nothing wrong" in capsys.readouterr().out


def shifted(rows: np.ndarray) -> np.ndarray:
    rows[3, 2] = rows[3, 0]
    return rows


def negative(rows: np.ndarray) -> np.ndarray:
    rows[2, 0, 0] = -1
    return rows


def odd_mask(rows: np.ndarray) -> np.ndarray:
    rows[1, 1, 4] = 2
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "data-00000.h5: row 3: position "),
        (negative, "data-00000.h5: row 2: ids from -1"),
        (odd_mask, "data-00000.h5: row 1: loss mask holds 2"),
        (lambda rows: rows[:-1], "data-00000.h5: has rows 19, not 20 as stated"),
        (lambda rows: np.concatenate([rows[:-1], rows[:1]]), "data-00000.h5: has a checksum of the rows of"),
    ],
)
def test_faults_are_named(folder: Path, change: Callable, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder / "data-00000.h5", change)
    assert message in "\n".join(verify(folder))
    with pytest.raises(SystemExit) as done:
        main(["verify", str(folder)])
    assert done.value.code == 1
    assert message in capsys.readouterr().out


def test_files_are_compared(folder: Path) -> None:
    assert "ids from" in verify(folder, 50)[0]
    shutil.copy(folder / "data-00000.h5", folder / "data-00002.h5")
    assert "data-00002.h5: is not in the manifest" in verify(folder)[0]
    (folder / "data-00002.h5").unlink()
    rewrite(folder.parent / "in/a.h5", lambda rows: rows[:-1])
    assert "does not hold the rows of its inputs" in verify(folder)[0]
    (folder / "data-00001.h5").rename(folder / "data-00001.h5.partial")
    assert ["is incomplete" in fault or "is missing" in fault for fault in verify(folder)] == [True, True]
    content = (folder / "data-00000.h5").read_bytes()
    (folder / "data-00000.h5").write_bytes(content[: len(content) // 2])
    assert "not a readable HDF5" in verify(folder)[0]


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A folder of tokenised rows, the last of them padded, and one of these after FIM."""
    (tmp_path / "texts.jsonl").write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    common = ["--tokenizer", str(tokenizer_file)]
    main(["tokenize", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "tok"), *common, "--max-seq-length", "64"])
    main(["fim", str(tmp_path / "tok"), "--out", str(tmp_path / "fim"), *common, "--rate", "0.5"])
    assert verify(tmp_path / "tok") == verify(tmp_path / "fim") == []
    return tmp_path


def hole(rows: np.ndarray) -> np.ndarray:
    rows[1, 1, 4] = 0
    return rows


def one_label(rows: np.ndarray) -> np.ndarray:
    rows[1, 2, 4] += 1
    return rows


def too_large(rows: np.ndarray) -> np.ndarray:
    rows[0, 0, 7] = rows[0, 2, 6] = 4000
    return rows


def unpadded(rows: np.ndarray) -> np.ndarray:
    rows[-1, 1] = 1
    return rows


def doubled(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:2], rows[1:2], rows[3:]])


@pytest.mark.parametrize("step", ["tok/examples_0_0.h5", "fim/epoch_0/examples_0_0.h5"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hole, "examples_0_0.h5: row 1: position 4: loss mask 0, but the next position counts"),
        (one_label, "examples_0_0.h5: row 1: position 4: label "),
        (too_large, "4000, 4"),
        (unpadded, ": has padding "),
        (doubled, "examples_0_0.h5: has a checksum of the rows of "),
        (lambda rows: rows[1:], ": has sequences "),
    ],
)
def test_damage_of_packed_rows(prepared: Path, step: str, change: Callable, message: str) -> None:
    """Planted: each check left out in turn (`is_packed` False, no vocab_size, no counts) -> its fault is missing."""
    rewrite(prepared / step, change)
    assert message in "\n".join(verify(prepared / step.split("/")[0]))


def test_damage_that_h5py_does_not_see(prepared: Path) -> None:
    """A count that is wrong, a row that does not inflate, a step that is not finished, rows of another file."""
    path = prepared / "tok/examples_0_0.h5"
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        file.attrs["n_examples"] = 3
    assert "examples_0_0.h5: n_examples is 3, there are " in verify(prepared / "tok")[0]
    with SequenceFile(path) as file_:
        chunk = file_.read_compressed(2)
    path.write_bytes(whole.replace(chunk, b"\0" * len(chunk)))
    assert "examples_0_0.h5: row 2 is damaged" in verify(prepared / "tok")[0]
    path.write_bytes(whole)
    assert verify(prepared / "tok") == []
    (prepared / "tok/.tasks").mkdir()
    assert verify(prepared / "tok") == [f"{prepared / 'tok'}: the step is not finished: run it again"]


def test_a_damaged_row_is_not_shuffled_in_silence(prepared: Path) -> None:
    """Rows are moved deflated. Planted: what the input's manifest states not compared -> no error, fails."""
    main(["split", str(prepared / "tok")])
    halves = [str(prepared / f"tok_part{half}of2") for half in range(1)]
    main(["shuffle", *halves, str(prepared / "fim"), "--out", str(prepared / "good"), "--files", "2"])
    path = prepared / "tok/examples_0_0.h5"
    with SequenceFile(path) as file:
        chunk = file.read_compressed(2)
    path.write_bytes(path.read_bytes().replace(chunk, chunk[:-9] + b"\0" + chunk[-8:]))
    command = ["shuffle", *halves, str(prepared / "fim"), "--out", str(prepared / "bad"), "--files", "2"]
    for _ in range(2):
        with pytest.raises(InputError, match=r"bad: holds other rows than its inputs' manifests state"):
            main(command)
    shutil.copytree(prepared / "tok", prepared / "bare", ignore=shutil.ignore_patterns("manifest.json"))
    main(["shuffle", str(prepared / "bare"), "--out", str(prepared / "unknown"), "--files", "2"])


def test_rows_in_the_wrong_file(folder: Path) -> None:
    """A row that changed places with one of another file: all are there once, and both files are named."""
    first, second = folder / "data-00000.h5", folder / "data-00001.h5"
    one, other = (np.stack(list(SequenceFile(path).rows())) for path in (first, second))
    rewrite(first, lambda rows: np.concatenate([other[:1], rows[1:]]))
    rewrite(second, lambda rows: np.concatenate([one[:1], rows[1:]]))
    faults = verify(folder)
    assert ["data-00000.h5: has a checksum" in faults[0], "data-00001.h5: has a checksum" in faults[1]] == [True, True]


def change_places(file: h5py.File) -> None:
    one, other = (file["data"].id.read_direct_chunk((row, 0, 0))[1] for row in (1, 2))
    file["data"].id.write_direct_chunk((2, 0, 0), one)
    file["data"].id.write_direct_chunk((1, 0, 0), other)


def another_document(file: h5py.File) -> None:
    file["provenance/document"][3] += 1


def another_path(file: h5py.File) -> None:
    file["provenance/paths"][0] = b"elsewhere"


def no_paths(file: h5py.File) -> None:
    del file["provenance/paths"]


def fewer_spans(file: h5py.File) -> None:
    file["provenance/row_ends"][-1] -= 1


def no_provenance(file: h5py.File) -> None:
    del file["provenance"]


@pytest.mark.parametrize("step", ["tok", "fim/epoch_0"])
@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (change_places, ["its rows have changed places"]),
        (another_document, ["names other documents"]),
        (another_path, ["names other documents"]),
        (no_provenance, ["names other documents"]),
        (no_paths, ["its provenance cannot be read", "names other documents"]),
        (fewer_spans, ["its provenance cannot be read", "names other documents"]),
    ],
)
def test_order_and_provenance(prepared: Path, step: str, change: Callable, messages: list[str]) -> None:
    """What leaves every row as it was. Planted: `order` and `documents` not compared -> nothing wrong, fails."""
    path = prepared / step / "examples_0_0.h5"
    with h5py.File(path, "a") as file:
        change(file)
    for fault, message in zip(verify(prepared / step.split("/")[0]), messages, strict=True):
        assert f"examples_0_0.h5: {message}" in fault
    if "cannot be read" in messages[0]:
        with pytest.raises(InputError, match="its provenance cannot be read"):
            main(["locate", str(path), "0"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_lines(path: Path, change: Callable[[bytes], bytes]) -> None:
    with zstandard.open(path) if path.suffix == ".zst" else path.open("rb") as file:
        content = change(file.read())
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)


def flip(path: Path) -> None:
    change_lines(path, lambda content: content.replace(b"fox", b"fix", 1))


def drop(path: Path) -> None:
    change_lines(path, lambda content: content.split(b"\n", 1)[1])


def copy(path: Path) -> None:
    shutil.copy(path, path.with_name(f"more_{path.name}"))


@pytest.mark.parametrize("name", ["lines/a.jsonl", "parts/train/a.jsonl.zst"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "a.jsonl: has 19 lines, not 20 as stated|a.jsonl.zst: damaged or cut off"),
        (flip, "its lines are not those that were written"),
        (drop, "lines, not "),
        (copy, "more_a.jsonl(.zst)?: is not in the manifest"),
        (Path.unlink, "no such file"),
    ],
)
def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable, message: str) -> None:
    """Planted: the checksum not compared -> another word is nothing wrong, fails."""
    texts = [f"{number} the quick brown fox" for number in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "a.parquet")
    main(["parquet2jsonl", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "lines")])
    main(["partition", str(tmp_path / "lines"), "--out", str(tmp_path / "parts"), "--valid", "0.2"])
    for folder in ("lines", "parts"):
        assert verify(tmp_path / folder) == []
    change(tmp_path / name)
    (fault,) = verify(tmp_path / name.split("/")[0])
    assert re.search(message, fault)
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / name.split("/")[0])])


def test_rows_of_conversations_are_well_formed() -> None:
    """A loss mask with holes: labels are checked where they count, padding is not."""
    row = np.array([[5, 6, 7, 8, 0], [0, 1, 0, 1, 0], [6, 7, 8, 9, 0]], np.int32)
    assert faults_of(row) == []
    row[2, 1] = 3
    assert "position 1: label 3, but token 7" in faults_of(row)[0]
