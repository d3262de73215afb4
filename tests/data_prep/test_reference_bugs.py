"""What the reference's tokenising does wrong, one test for each, by the numbers in docs/data.md (B1 to B13)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.commands import main as data
from data_prep.create_hdf5_dataset import main as lmdata
from data_prep.errors import InputError
from data_prep.packing import unpack
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.tokenizer import Tokenizer

LONG = "The quick brown fox jumps over the lazy dog. " * 200


def write_lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokenize(source: Path, out: Path, tokenizer: Path, *flags: str) -> dict[str, int]:
    """The counts."""
    data(["tokenize", str(source), "--out", str(out), "--tokenizer", str(tokenizer), "--max-seq-length", "32", *flags])
    counts: dict[str, int] = json.loads((out / "manifest.json").read_bytes())["counts"]
    return counts


def texts(out: Path, tokenizer: Tokenizer) -> list[str]:
    rows = (row for path in sequence_files(out) for row in SequenceFile(path).rows())
    return [tokenizer.decode(document[1:-1]) for document in unpack(rows, tokenizer.eos_id)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_b1_the_published_flags_run_without_vendor_packages(
    tmp_path: Path, tokenizer_file: Path, repo_root: Path
) -> None:
    write_lines(tmp_path / "in/a.jsonl", LONG)
    code = "import sys; sys.modules.update(cerebras_pytorch=None, cerebras_appliance=None, torch=None)\n"
    code += "from data_prep.create_hdf5_dataset import main; main(sys.argv[1:])"
    flags = ["LMData", "--params", "data_prep/configs/star_tokenizer_config.yaml", "--input_dir", str(tmp_path / "in"),
             "--output_dir", str(tmp_path / "out"), "--eos_id", "2", "--pad_id", "2", "--max_seq_length", "2048",
             "--seed", "45", "--processes", "1", "--split_text_to_tokenize", "True", "--ignore_bos_in_split_text",
             "True", "--encoder_file", str(tokenizer_file)]  # fmt: skip
    subprocess.run([sys.executable, "-c", code, *flags], cwd=repo_root, check=True)
    assert len(sequence_files(tmp_path / "out")) == 1
    assert tuple(map(int, np.__version__.split(".")[:2])) >= (1, 25)


def test_b2_parquet_is_written_once_and_an_error_is_one(tmp_path: Path) -> None:
    (tmp_path / "in/css").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), tmp_path / "in/css/x.parquet")
    command = ["parquet2jsonl", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for _ in range(2):
        data(command)
        assert len((tmp_path / "out/css/x.jsonl").read_text().splitlines()) == 2
    (tmp_path / "in/css/bad.parquet").write_bytes(b"PAR1")
    done = subprocess.run([sys.executable, "-m", "tools.cli", "data", *command, "--overwrite"], capture_output=True)
    assert done.returncode == 2
    assert b"bad.parquet" in done.stderr


def test_b3_neither_the_disk_nor_the_processes_decide_the_order(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "bca":
        write_lines(tmp_path / f"in/{name}.jsonl", f"{name} {LONG}", name)
    walk = os.walk
    for out, processes, backwards in (("a", "1", False), ("b", "2", False), ("c", "1", True)):
        with monkeypatch.context() as patch:
            if backwards:
                patch.setattr(os, "walk", lambda *a, **k: [(p, f, n[::-1]) for p, f, n in walk(*a, **k)][::-1])
            tokenize(tmp_path / "in", tmp_path / out, tokenizer_file, "--processes", processes, "--shard-mb", "0")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_b4_the_file_is_not_overruled_by_defaults(tmp_path: Path, tokenizer_file: Path) -> None:
    """Of a tail of 8 tokens `min_sequence_len` decides: 10 in the file, 6 by default."""
    write_lines(tmp_path / "in/a.jsonl", LONG)
    with_tail = {}
    for name in ("", "dataset: {min_sequence_len: 10}"):
        (tmp_path / "c.yaml").write_text(f"processing: {{encoder_file: {tokenizer_file}}}\n{name}\n")
        for length in range(40, 80):
            out = tmp_path / f"{length}{bool(name)}"
            lmdata(["LMData", "--params", str(tmp_path / "c.yaml"), "--input_dir", str(tmp_path / "in"),
                    "--output_dir", str(out), "--max_seq_length", str(length)])  # fmt: skip
            counts = json.loads((out / "manifest.json").read_bytes())["counts"]
            with_tail[length, bool(name)] = counts.get("padding", 0) > 0
            tail = (counts["tokens"] - 1) % length
            if 5 <= tail < 9:
                break
    assert with_tail[length, False]
    assert not with_tail[length, True]


def test_b5_a_bad_document_is_named_or_left_out(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_lines(tmp_path / "in/a.jsonl", "one", "two")
    path.write_text(path.read_text() + '{"text": 3}\n{"text": "three"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:3: 'text' is a number, not text"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    counts = tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, "--on-error", "skip")
    assert (counts["documents"], counts["rejected"]) == (3, 1)
    assert json.loads((tmp_path / "out/rejects.jsonl").read_text())["place"] == "3"


def test_b6_an_empty_document_is_counted(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    write_lines(tmp_path / "in/a.jsonl", "one", "", "two")
    counts = tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    assert (counts["documents"], counts["documents_empty"]) == (2, 1)
    assert texts(tmp_path / "out", tokenizer) == ["one", "two"]


def test_b7_no_spaces_at_seams(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    """And the ids are those of the whole text."""
    write_lines(tmp_path / "in/a.jsonl", LONG)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    assert texts(tmp_path / "out", tokenizer) == [LONG]
    rows = (row for path in sequence_files(tmp_path / "out") for row in SequenceFile(path).rows())
    (document,) = unpack(rows, tokenizer.eos_id)
    assert document[1:-1].tolist() == tokenizer.encode_uncached(" " + LONG)


def test_b8_control_tokens_in_a_text_stay_text(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    written = ["a </s> b", "<s><s>", "x <|fim_prefix|> y <unk>", "</s>"]
    write_lines(tmp_path / "in/a.jsonl", *written)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    assert texts(tmp_path / "out", tokenizer) == written


def test_b9_code_is_not_repaired(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    """Unless asked for; then it is counted."""
    code = "print(“é”)\r\nx = '&amp;'\x0b\ufeff"
    write_lines(tmp_path / "in/a.jsonl", code, "plain")
    assert tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)["documents_cleaned"] == 0
    assert texts(tmp_path / "out", tokenizer) == [code, "plain"]
    lmdata(["LMData", "--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "mended"),
            "--encoder_file", str(tokenizer_file), "--use_ftfy", "True", "--max_seq_length", "32"])  # fmt: skip
    assert json.loads((tmp_path / "mended/manifest.json").read_bytes())["counts"]["documents_cleaned"] == 1


def test_b10_the_last_window_is_kept(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    """Padded, with loss mask 0 on the padding; the tokens add up."""
    write_lines(tmp_path / "in/a.jsonl", "one two three", "four")
    counts = tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    (row,) = SequenceFile(sequence_files(tmp_path / "out")[0]).rows()
    assert row[1].sum() == counts["tokens"] - 1 == 32 - counts["padding"]
    assert texts(tmp_path / "out", tokenizer) == ["one two three", "four"]


def test_b11_resuming_repeats_and_loses_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    """Stopped in the third of four tasks and started again: the bytes and counts of an undisturbed run."""
    for name in "abcd":
        write_lines(tmp_path / f"in/{name}.jsonl", f"{name} {LONG}", name)
    good = (tmp_path / "in/c.jsonl").read_bytes()
    tokenize(tmp_path / "in", tmp_path / "whole", tokenizer_file, "--shard-mb", "0")
    (tmp_path / "in/c.jsonl").write_bytes(good[:-5] + b"@" * 5)  # the size is the same: so are the settings
    with pytest.raises(InputError, match=r"c\.jsonl:2"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, "--shard-mb", "0")
    assert len(list((tmp_path / "out").glob("*.h5"))) == 2
    (tmp_path / "in/c.jsonl").write_bytes(good)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, "--shard-mb", "0")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_b12_nobody_is_asked(tmp_path: Path, tokenizer_file: Path) -> None:
    """With stdin closed: refused in one line, done with --overwrite."""
    write_lines(tmp_path / "in/a.jsonl", LONG)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    command = [sys.executable, "-m", "tools.cli", "data", "tokenize", str(tmp_path / "in"), "--out",
               str(tmp_path / "out"), "--tokenizer", str(tokenizer_file), "--max-seq-length", "16"]  # fmt: skip
    environment = dict(os.environ)
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    subprocess.run([*command, "--overwrite"], stdin=subprocess.DEVNULL, check=True, env=environment)
    assert SequenceFile(sequence_files(tmp_path / "out")[0]).max_seq_length == 16


def test_b13_verifying_is_a_command_of_its_own(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It finds a wrong label, a mask and an id out of range, and says which row."""
    write_lines(tmp_path / "in/a.jsonl", LONG)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file)
    data(["verify", str(tmp_path / "out")])
    for row, plane, column, value in ((3, 2, 5, 7), (4, 1, 2, 2), (5, 0, 9, 10_000)):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, "--overwrite")
        with h5py.File(sequence_files(tmp_path / "out")[0], "r+") as file:
            file["data"][row, plane, column] = value
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1"):
            data(["verify", str(tmp_path / "out"), "--vocab-size", "700"])
        assert f"row {row}" in capsys.readouterr().out
