"""`--reference-compat` gives the reference's arrays, names, attributes and data_params.json; the default mends them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.commands import main as data
from data_prep.create_hdf5_dataset import main
from data_prep.errors import InputError
from data_prep.packing import unpack
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.tokenizer import Tokenizer

COMMON = ["--eos_id", "2", "--pad_id", "2", "--seed", "45", "--split_text_to_tokenize", "True", "--files_per_record",
          "50000", "--write_in_batch", "True", "--use_ftfy", "True"]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the fixtures' file lists expect it."""
    folder = tmp_path_factory.mktemp("workplace")
    source = shared / "fixtures/data/input"
    for name in ("slim.meta", "star.meta", "s3_css.meta"):
        (folder / name).write_text((source / name).read_text())
    slim = folder / "data/slimpajama"
    slim.mkdir(parents=True)
    (slim / "chunk0.jsonl").write_bytes(gzip.decompress((source / "slimpajama/chunk0.jsonl.gz").read_bytes()))
    for name in ("chunk1.jsonl", "chunk2.jsonl.zst"):
        (slim / name).write_bytes((source / "slimpajama" / name).read_bytes())
    data(["parquet2jsonl", str(source / "starcoderdata"), "--out", str(folder / "data/starcoderdata_jsonl")])
    (folder / "tokenizer.json").write_bytes((shared / "data/llama_tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("case", "flags"),
    [
        ("star_2048_p1", ["--metadata_files", "star.meta", "--max_seq_length", "2048"]),
        ("slim_256_p2", ["--metadata_files", "slim.meta", "--max_seq_length", "256", "--processes", "2"]),
        ("slim_256_unpacked", ["--metadata_files", "slim.meta", "--max_seq_length", "256", "--pack_sequences", "no"]),
        ("s3_2048_css", ["--metadata_files", "s3_css.meta", "--max_seq_length", "2048"]),
    ],
)  # fmt: skip
def test_the_reference_to_the_byte(
    workplace: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, case: str, flags: list[str]
) -> None:
    """Planted: splitting at s + 1999 -> other seams (detokenized_bytes 433,287 for 433,283), all four cases fail;
    writing a process's last window padded -> more sequences, the packed cases fail; counting bytes after ftfy ->
    raw_bytes_count 435,959 for 436,040, three fail (plain CSS has nothing to mend)."""
    monkeypatch.chdir(workplace)
    out = f"tok/{case}"
    main(["LMData", *COMMON, *flags, "--remove_bos_in_chunks", "True", "--encoder_file", "./tokenizer.json",
          "--output_dir", out, "--reference-compat"])  # fmt: skip
    expected = shared / "fixtures/data/out/tok" / case
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in Path(out).iterdir() if path.name != "manifest.json") == names
    for name in names:
        if not name.endswith(".h5"):
            assert (Path(out) / name).read_text().strip() == (expected / name).read_text().strip()
            continue
        with h5py.File(Path(out) / name) as ours, h5py.File(expected / name) as theirs:
            assert np.array_equal(ours["data"][:], theirs["data"][:])
            assert dict(ours.attrs) == dict(theirs.attrs)
            for attribute in ("dtype", "chunks", "compression", "compression_opts", "shuffle"):
                assert getattr(ours["data"], attribute) == getattr(theirs["data"], attribute)


def test_the_default_keeps_the_text(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same command without --reference-compat: exact texts (no seam spaces), no forged ends, no lost tail."""
    monkeypatch.chdir(workplace)
    main(["LMData", *COMMON, "--metadata_files", "slim.meta", "--max_seq_length", "256", "--encoder_file",
          "tokenizer.json", "--output_dir", str(tmp_path / "out"), "--processes", "2", "--ignore_bos_in_split_text",
          "True", "--use_ftfy", "False"])  # fmt: skip
    from data_prep.sources import FaultPolicy, read_documents
    from data_prep.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("tokenizer.json")
    texts = [d.text for line in Path("slim.meta").read_text().split() for d in read_documents(line, FaultPolicy())]
    (path,) = sequence_files(tmp_path / "out")
    documents = [d[1:-1] for d in unpack(SequenceFile(path).rows(), 2)]
    assert [tokenizer.decode(document) for document in documents] == [t.replace("▁", " ") for t in texts if t]


def test_flag_beats_file_beats_default(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    """And in compat mode three options come from the command line or its default only, as in the reference."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"body": "one two three"}\n' * 30)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"setup: {{input_dir: {tmp_path}/in, output_dir: {tmp_path}/a, processes: 2}}\n"
        f"processing: {{encoder_file: {tokenizer_file}, max_seq_length: 32, files_per_record: 4, output_name: rows}}\n"
        "dataset: {jsonl_key: body, min_sequence_len: 10, sep_token: null}\n"
    )
    main(["LMData", "--params", str(config), "--max_seq_length", "16"])
    files = sequence_files(tmp_path / "a")
    assert {SequenceFile(path).max_seq_length for path in files} == {16}
    assert files[0].name == "rows_0_0.h5"
    assert len(SequenceFile(files[0])) == 4
    eos = str(tokenizer.eos_id)
    main(
        ["LMData", "--params", str(config), "--output_dir", str(tmp_path / "b"), "--eos_id", eos, "--reference-compat"]
    )
    parameters = json.loads((tmp_path / "b/data_params.json").read_text())
    assert parameters["dataset"]["min_sequence_len"] == 6
    assert parameters["processing"]["output_name"] == "examples"
    assert sequence_files(tmp_path / "b")[0].name == "examples_0_0.h5"


def test_reference_short_sequences_and_inverted_mask(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one two three four five six"}\n' * 50)
    (tmp_path / "a.meta").write_text(f"{tmp_path}/a.jsonl\n")
    common = ["LMData", "--metadata_files", str(tmp_path / "a.meta"), "--encoder_file", str(tokenizer_file), "--eos_id",
              "2", "--max_seq_length", "16", "--seed", "5", "--reference-compat"]  # fmt: skip
    main([*common, "--output_dir", str(tmp_path / "plain")])
    main([*common, "--output_dir", str(tmp_path / "short"), "--short_seq_prob", "0.5", "--inverted_mask", "True"])
    plain, short = (np.stack(list(SequenceFile(sequence_files(tmp_path / n)[0]).rows())) for n in ("plain", "short"))
    counted = 1 - short[:, 1]
    lengths = counted.sum(axis=1)
    assert 0.2 < (lengths < 16).mean() < 0.8
    assert lengths.min() >= 1
    keep = counted.astype(bool)
    assert np.array_equal(short[:, 0][keep], plain[:, 0][keep])
    assert (short[:, 0][~keep] == 2).all()


def test_refusals(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ""}\n')
    (tmp_path / "a.meta").write_text(f"{tmp_path}/a.jsonl\n")
    (tmp_path / "bad.yaml").write_text("dataset: {min_sequence_length: 3}\n")
    (tmp_path / "type.yaml").write_text("processing: {max_seq_length: '2048'}\n")
    out = ["--output_dir", str(tmp_path / "out"), "--encoder_file", str(tokenizer_file)]
    listed = [*out, "--metadata_files", str(tmp_path / "a.meta")]
    for flags, message in [
        ([*out], "--input_dir or --metadata_files is missing"),
        (["--input_dir", str(tmp_path)], "--output_dir is missing"),
        ([*out, "--input_dir", "/nowhere"], "no such folder"),
        ([*listed, "--params", str(tmp_path / "bad.yaml")], "dataset.min_sequence_length is not known"),
        ([*listed, "--params", str(tmp_path / "type.yaml")], "max_seq_length is '2048', int is expected"),
        ([*listed, "--params", str(tmp_path / "none.yaml")], "cannot be read"),
        ([*listed, "--short_seq_prob", "0.1"], "only with --reference-compat"),
        ([*listed, "--eos_id", "5"], "</s> is 2"),
        ([*listed, "--reference-compat"], "--eos_id is missing"),
        ([*listed, "--reference-compat", "--eos_id", "2", "--split_text_to_tokenize", "True",
          "--ignore_bos_in_split_text", "True"], "a.jsonl:2: the text is empty"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            main(["LMData", *flags])
    assert not (tmp_path / "out").exists()


def test_the_published_command_line(workplace: Path, repo_root: Path, tmp_path: Path) -> None:
    """As a script, with the shipped configuration, from another folder."""
    command = [sys.executable, str(repo_root / "data_prep/create_hdf5_dataset.py"), "LMData", "--params",
               str(repo_root / "data_prep/configs/star_tokenizer_config.yaml"), "--input_dir",
               "data/starcoderdata_jsonl/css", "--output_dir", str(tmp_path / "out"), "--eos_id", "2", "--pad_id", "2",
               "--max_seq_length", "2048", "--seed", "45", "--processes", "4", "--split_text_to_tokenize", "True",
               "--ignore_bos_in_split_text", "True", "--encoder_file", "tokenizer.json"]  # fmt: skip
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert len(SequenceFile(tmp_path / "out/examples_0_0.h5")) == 10  # the reference has 9: its tail is lost
    bad = subprocess.run([*command, "--eos_id", "7"], cwd=workplace, capture_output=True, text=True)
    assert bad.returncode == 2
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [[], ["--reference-compat"]])
def test_the_script_of_stage_3(template_tokenizer: Path, repo_root: Path, tmp_path: Path, flags: list[str]) -> None:
    """All four languages, in the reference's folders; with the data that `partition` makes."""
    (tmp_path / "tokenizer.json").write_bytes(template_tokenizer.read_bytes())
    for language in ("python", "html", "css", "javascript"):
        path = tmp_path / f"data/starcoderdata_jsonl/{language}/a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": f"{language} {n} " * 99}) + "\n" for n in range(20)))
    partition = ["partition", str(tmp_path / "data/starcoderdata_jsonl"), "--valid", "0.1"]
    data([*partition, "--out", str(tmp_path / "data/starcoderdata_jsonl_split")])
    script = repo_root / "data_prep/scripts/stage3_tokenization_script.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "PROCESSES": "1"}
    subprocess.run([str(script), *flags], cwd=tmp_path, env=environment, check=True, capture_output=True)
    for language in ("python", "html", "css", "javascript"):
        out = tmp_path / "data/starcoderdata_tokenized_stage3_split/train" / language
        assert SequenceFile(sequence_files(out)[0]).max_seq_length == 2048
        assert (out / "data_params.json").exists() == bool(flags)
