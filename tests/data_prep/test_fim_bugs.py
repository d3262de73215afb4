"""The faults of the reference's FIM on packed rows, one by one: shown on the reference's way, mended here.

`fim_row` of the benchmarks is the reference's transform, stated independently of data_prep.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from data_prep import fim_hdf5_stage2, fim_hdf5_stage3
from data_prep.fim import FimSettings, RowFim, undo
from data_prep.packing import padded_row, stream_of
from data_prep.reference_fim import _backend
from data_prep.sequences import SequenceFile, SequenceWriter, compress_row, sequence_files
from data_prep.tokenizer import Tokenizer, _load_remembered
from tools.bench.plain_rows import MARKS, fim_row

SENTENCE = "The quick brown fox jumps over the lazy dog, and then the dog sleeps"
SEEDS = range(30)


@pytest.fixture(scope="module")
def backend(tokenizer_file: Path) -> Any:
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    loaded.add_special_tokens(list(MARKS))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    loaded.decoder = decoders.Sequence(steps)  # as LLaMA's
    return loaded


def document(tokenizer: Tokenizer, text: str = SENTENCE) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def packed(stream: list[int], length: int | None = None, pad: int = 2) -> np.ndarray:
    """A row (3, L) of L + 1 tokens, or of fewer and padding."""
    return padded_row(np.array(stream, np.int32), length or len(stream) - 1, pad)


def theirs(row: np.ndarray, backend: Any, seed: int, rate: float = 1.0) -> np.ndarray:
    return fim_row(row, backend, np.random.RandomState(seed), rate)


def ours(row: np.ndarray, tokenizer: Tokenizer, seed: int, rate: float = 1.0) -> np.ndarray:
    return RowFim(tokenizer, FimSettings(rate, seed=seed))(row, 0, "a.h5", 0)


def texts(row: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """A row's texts with their BOS, undone."""
    bos, eos, stream = tokenizer.bos_id, tokenizer.eos_id, stream_of(row).tolist()
    found: list[list[int]] = [[]]
    for token in stream:
        if token == eos:
            found.append([])
        else:
            found[-1].append(token)
    return [t[:1] + undo(t[1:], tokenizer.fim_ids) if t[:1] == [bos] else undo(t, tokenizer.fim_ids) for t in found]


def raw(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.piece_bytes[i] for i in ids)


def test_b14_no_middle_is_cut_short(tokenizer: Tokenizer, backend: Any) -> None:
    """A full row: the reference cuts what is too long off the end, which is the middle; here the text gives way first.

    Planted: `count -= size - room` replaced by cutting the transform -> texts that are no beginning of theirs, fails.
    """
    stream = [*document(tokenizer), *document(tokenizer), *document(tokenizer)[:-4]]
    row = packed(stream)
    before = texts(row, tokenizer)
    lost = 0
    for seed in SEEDS:
        marks = [t for t in theirs(row, backend, seed)[0].tolist() if t >= backend.token_to_id(MARKS[0])]
        reference = RowFim(tokenizer, FimSettings(1.0, seed=seed))
        result = reference(row, 0, "a.h5", 0)
        after = texts(result, tokenizer)
        assert [raw(tokenizer, t) for t in after[:-1]] == [raw(tokenizer, t) for t in before[: len(after) - 1]]
        assert raw(tokenizer, before[len(after) - 1]).startswith(raw(tokenizer, after[-1]))
        assert reference.counts["tokens_dropped"] > 0
        lost += len(marks) % 3 != 0 or len(marks) < 9
    assert lost  # the reference lost a mark with what followed it


def test_b15_the_last_label_is_the_token_that_follows(tokenizer: Tokenizer, backend: Any) -> None:
    """Planted: `padded_row` given the stream without its last token -> the row is one shorter, fails."""
    row = packed(document(tokenizer)[:-4])
    assert row[2, -1] != tokenizer.eos_id
    assert theirs(row, backend, 0, rate=0.0)[2, -1] == tokenizer.eos_id
    assert np.array_equal(ours(row, tokenizer, 0, rate=0.0), row)
    for seed in SEEDS:
        result = ours(row, tokenizer, seed)
        count = int(result[1].sum())
        assert result[2, count - 1] != tokenizer.eos_id
        assert np.array_equal(result[2, : count - 1], result[0, 1:count])


def test_b16_the_mask_is_made_from_the_content(tokenizer: Tokenizer, backend: Any) -> None:
    """A padded row grows by the marks: in the reference tokens come to stand under the padding's zeros."""
    row = packed(document(tokenizer), 64)
    pad = tokenizer.fim_ids.pad
    for seed in SEEDS:
        reference, result = theirs(row, backend, seed), ours(row, tokenizer, seed)
        their_pad = backend.token_to_id("<fim_pad>")
        assert ((reference[0] != their_pad) & (reference[1] == 0)).any()
        count = int(result[1].sum())
        assert count >= row[1].sum() + 3
        assert result[1, :count].all()
        assert (result[0, count:] == pad).all()
        assert pad not in result[0, :count]


def test_b17_every_eos_stays_and_nothing_gets_marks_for_nothing(tokenizer: Tokenizer, backend: Any) -> None:
    """Planted: `_has_text` always true -> marks behind a BOS that begins nothing, fails."""
    eos = tokenizer.eos_id
    stream = [eos, eos, *document(tokenizer), eos, tokenizer.bos_id, eos, *document(tokenizer)]
    row = packed(stream, 160)
    assert theirs(row, backend, 0)[0].tolist().count(eos) < stream.count(eos)
    assert theirs(packed([*document(tokenizer), 1]), backend, 0)[0].tolist()[-1] != eos  # PRE SUF MID, cut off
    for seed in SEEDS:
        found = stream_of(ours(row, tokenizer, seed)).tolist()
        assert found.count(eos) == stream.count(eos)
        assert found[:3] == [eos, eos, tokenizer.bos_id]
        assert found.count(tokenizer.fim_ids.prefix) == found.count(tokenizer.fim_ids.middle) == 2


def test_b18_bos_stays_in_front(tokenizer: Tokenizer, backend: Any) -> None:
    """A cut inside the text `<s>` takes BOS apart in the reference. Planted: has_bos = 0 -> PRE in front, fails."""
    row = packed(document(tokenizer, "a b"), 32)
    assert any(tokenizer.bos_id not in theirs(row, backend, seed)[0] for seed in range(60))
    for seed in range(60):
        found = ours(row, tokenizer, seed)[0].tolist()
        assert found[:2] == [tokenizer.bos_id, tokenizer.fim_ids.prefix]
        assert found.count(tokenizer.bos_id) == 1


def test_b19_a_character_cut_by_the_window_keeps_its_bytes(tokenizer: Tokenizer, backend: Any) -> None:
    """A row that begins and ends inside a character: U+FFFD in the reference, the same bytes here."""
    ids = tokenizer.encode("日本語 and 日本語")
    row = packed([*ids[2:-1], tokenizer.eos_id], 64)  # "▁" and the first byte of 日 lie in the row before
    before = raw(tokenizer, ids[2:-1])
    with pytest.raises(UnicodeDecodeError):
        before.decode()
    replacement = set(tokenizer.encode("\ufffd")[1:])
    assert any(replacement <= set(theirs(row, backend, seed)[0].tolist()) for seed in SEEDS)
    for seed in SEEDS:
        (first, last) = texts(ours(row, tokenizer, seed), tokenizer)
        assert (raw(tokenizer, first), last) == (before, [])


def files_of(folder: Path, names: list[str], rows: np.ndarray) -> None:
    for name in names:
        with SequenceWriter(folder / name, rows.shape[2]) as writer:
            writer.write(rows)


def test_b20_every_file_has_its_own_chances(tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path) -> None:
    """The same rows in four files: alike in the reference where one process had them; here never, whoever does them.

    Planted: the file's name left out of the key -> all four alike, fails.
    """
    rows = np.repeat(packed(document(tokenizer), 64)[None], 5, axis=0)
    files_of(tmp_path / "in", ["a.h5", "b.h5", "c.h5", "d.h5"], rows)
    command = ["--input_dir", str(tmp_path / "in"), "--tokenizer", str(tokenizer_file), "--epochs", "2"]

    def run(out: str, *flags: str) -> dict[str, bytes]:
        fim_hdf5_stage2.main([*command, "--output_dir", str(tmp_path / out), *flags])
        paths = sequence_files(tmp_path / out, recursive=True)
        return {path.relative_to(tmp_path / out).as_posix(): path.read_bytes() for path in paths}

    grouped = run("compat", "--reference-compat", "--reference-processes", "2")
    assert grouped["epoch_0/a.h5"] == grouped["epoch_0/b.h5"] != grouped["epoch_0/c.h5"]
    assert grouped != run("compat_4", "--reference-compat", "--reference-processes", "4")
    one = run("one")
    assert len(set(one.values())) == 8
    assert one == run("two", "--processes", "2")
    assert one != run("seed", "--seed", "1")


def test_b21_a_damaged_file_ends_the_step(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path, repo_root: Path
) -> None:
    """One line with file and row, exit 2; after mending it the relaunch has as many rows as went in, in each epoch."""
    rows = np.repeat(packed(document(tokenizer), 64)[None], 5, axis=0)
    files_of(tmp_path / "in", ["a.h5", "b.h5"], rows)
    whole = (tmp_path / "in/b.h5").read_bytes()
    chunk = compress_row(rows[0])
    (tmp_path / "in/b.h5").write_bytes(whole.replace(chunk, b"\0" * len(chunk)))
    command = [sys.executable, "-m", "data_prep.fim_hdf5_stage2", "--input_dir", str(tmp_path / "in"), "--output_dir",
               str(tmp_path / "out"), "--tokenizer", str(tokenizer_file)]  # fmt: skip
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "b.h5: row 0 is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "in/b.h5").write_bytes(whole)
    assert subprocess.run(command, cwd=repo_root, capture_output=True).returncode == 0
    found = [len(SequenceFile(path)) for path in sequence_files(tmp_path / "out", recursive=True)]
    assert found == [5] * 4


@pytest.mark.parametrize("compat", [[], ["--reference-compat"]])
def test_b22_stage_3_writes_the_same_format(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path, compat: list[str]
) -> None:
    rows = np.repeat(packed(document(tokenizer), 64)[None], 5, axis=0)
    files_of(tmp_path / "in/css", ["a.h5"], rows)
    fim_hdf5_stage3.main(["--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--tokenizer",
                          str(tokenizer_file), "--languages", "css", *compat])  # fmt: skip
    for epoch in range(3):
        with h5py.File(tmp_path / f"out/css_{epoch}/a.h5") as file:
            assert file.attrs["n_examples"] == 5
            assert file["data"].chunks == (1, 3, 64)
            assert file["data"].shape == (5, 3, 64)


@pytest.mark.parametrize("compat", [[], ["--reference-compat"]])
def test_b23_rows_are_streamed_and_the_tokenizer_is_read_once(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compat: list[str]
) -> None:
    """A row is written before the next one is read, and no row or file reads the vocabulary again.

    Planted: `list(source.rows_and_chunks())` -> all 40 rows are read first, fails.
    """
    rows = np.repeat(packed(document(tokenizer), 64)[None], 40, axis=0)
    files_of(tmp_path / "in/css", ["a.h5", "b.h5", "c.h5"], rows)
    read = written = ahead = 0
    real_compressed, real_write = SequenceFile.compressed, SequenceWriter.write_compressed

    def counted_compressed(self: SequenceFile, *arguments: int) -> Iterator[bytes]:
        nonlocal read
        for chunk in real_compressed(self, *arguments):
            read += 1
            yield chunk

    def counted_write(self: SequenceWriter, chunks: Any, *arguments: Any) -> None:
        def counting() -> Iterator[bytes]:
            nonlocal written, ahead
            for chunk in chunks:
                ahead = max(ahead, read - written)
                written += self.path.parent.name == "css_0"
                yield chunk

        real_write(self, counting(), *arguments)

    monkeypatch.setattr(SequenceFile, "compressed", counted_compressed)
    monkeypatch.setattr(SequenceWriter, "write_compressed", counted_write)
    for remembered in (_load_remembered, _backend):
        remembered.cache_clear()
    fim_hdf5_stage3.main(["--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--tokenizer",
                          str(tokenizer_file), "--languages", "css", "--epochs", "1", *compat])  # fmt: skip
    assert (read, written, ahead) == (120, 120, 1)
    assert _load_remembered.cache_info().misses == 1
    assert _backend.cache_info().misses == len(compat)
