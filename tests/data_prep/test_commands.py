"""The steps by their command lines: right output, whatever the number of processes; bad input: one line, exit 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.fim import undo
from data_prep.packing import unpack
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.tokenizer import Tokenizer, load_tokenizer
from support.tiny_tokenizer import TEXT

Run = Callable[..., None]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages in parquet, five files, 60 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    words = TEXT.split(" ")
    generator = np.random.default_rng(0)
    for number in range(5):
        texts = [" ".join(generator.choice(words, 60)) + f" {number} {k} é/日" for k in range(12)]
        path = folder / ("css", "python")[number % 2] / f"train-{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        columns = {"stars": [1, None, *range(10)], "content": texts, "score": [0.5, float("nan")] * 6}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return folder


def texts_of(corpus: Path) -> list[str]:
    return [
        t for path in sorted(corpus.rglob("*.parquet")) for t in pyarrow.parquet.read_table(path)["content"].to_pylist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_parquet_to_jsonl(corpus: Path, tmp_path: Path) -> None:
    main(["parquet2jsonl", str(corpus), "--out", str(tmp_path / "a")])
    main(["parquet2jsonl", str(corpus), "--out", str(tmp_path / "b"), "--processes", "2"])
    main(["parquet2jsonl", str(corpus), "--out", str(tmp_path / "a")])  # again: nothing is appended
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    lines = (tmp_path / "a/python/train-00001.jsonl").read_text(encoding="ascii").splitlines()
    assert len(lines) == 12
    assert lines[0].startswith('{"stars":1.0,"text":"')  # as a data frame holds integers with gaps
    assert lines[0].endswith('1 0 \\u00e9\\/\\u65e5","score":0.5}')
    assert lines[1].startswith('{"stars":null,')
    assert lines[1].endswith('"score":null}')
    texts = [json.loads(line)["text"] for path in sorted((tmp_path / "a").rglob("*.jsonl")) for line in path.open()]
    assert texts == texts_of(corpus)


@pytest.mark.parametrize("fim", [[], ["--fim-rate", "0.9"], ["--fim-rate", "1", "--fim-level", "token"]])
def test_tokenize_is_lossless(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer, fim: list[str]
) -> None:
    """Planted: no `packer.finish()` at the end of a shard -> the last document (59) is cut, fails."""
    main(["tokenize", str(corpus), "--out", str(tmp_path / "a"), "--tokenizer", str(tokenizer_file),
          "--max-seq-length", "64", "--rows-per-file", "50", *fim])  # fmt: skip
    texts = texts_of(corpus)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["counts"]["documents"] == len(texts)
    assert manifest["counts"]["characters"] == sum(map(len, texts))
    assert sum(file["rows"] for file in manifest["outputs"].values()) == manifest["counts"]["sequences"]
    assert max(file["rows"] for file in manifest["outputs"].values()) == 50
    rows = [row for path in sorted(sequence_files(tmp_path / "a"), key=lambda p: int(p.stem.split("_")[1]))
            for row in SequenceFile(path).rows()]  # fmt: skip
    found = [
        tokenizer.decode(undo([int(i) for i in document[1:-1]], tokenizer.fim_ids))
        for document in unpack(iter(rows), tokenizer.eos_id)
    ]
    assert found == texts


def test_output_does_not_depend_on_processes(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """tokenize with per-document FIM in two epochs, then fim, each with 1 and 2 processes.

    Planted: FIM keyed by how many shards this process has done, not by the file's name, first in `tokenize`, then in
    `fim` -> the HDF5 files differ, fails both times.
    """
    common = ["--tokenizer", str(tokenizer_file), "--seed", "3"]
    for number in ("1", "2"):
        out = tmp_path / number
        main(["tokenize", str(corpus), "--out", str(out / "tok"), *common, "--max-seq-length", "32",
              "--fim-rate", "0.5", "--epochs", "2", "--shard-mb", "0", "--processes", number])  # fmt: skip
        main(["tokenize", str(corpus), "--out", str(out / "raw"), *common, "--max-seq-length", "32",
              "--shard-mb", "0"])  # fmt: skip
        main(["fim", str(out / "raw"), "--out", str(out / "fim"), *common, "--rate", "0.9", "--epochs", "2",
              "--processes", number])  # fmt: skip
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    h5 = [name for name in one if name.endswith(".h5")]
    assert len(h5) == 5 * (2 + 1 + 2)
    assert all(one[name] == two[name] for name in h5)
    assert sorted(one) == sorted(two)
    assert one["tok/epoch_0/examples_0_0.h5"] != one["tok/epoch_1/examples_0_0.h5"]
    assert one["fim/epoch_0/examples_0_0.h5"] != one["fim/epoch_1/examples_0_0.h5"]
    # FIM of sequences keeps their number and names.
    for path in sequence_files(tmp_path / "1/raw"):
        assert len(SequenceFile(tmp_path / "1/fim/epoch_1" / path.name)) == len(SequenceFile(path))


def test_fim_rate_0_changes_nothing(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    tok, out = tmp_path / "tok", tmp_path / "fim"
    main(["tokenize", str(corpus), "--out", str(tok), "--tokenizer", str(tokenizer_file), "--max-seq-length", "32"])
    main(["fim", str(tok), "--out", str(out), "--tokenizer", str(tokenizer_file), "--rate", "0"])
    assert (tok / "examples_0_0.h5").read_bytes() == (out / "epoch_0/examples_0_0.h5").read_bytes()


def test_relaunch_completes_the_same_bytes(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies before each of its renames in turn (settings, five files and records, manifest), then again.

    Planted: a task's record written before its file -> dead between the two, the file is missing after the relaunch,
    fails; what is left of a run that died before its settings were in place taken for foreign files -> the relaunch is
    refused, fails.
    """
    arguments = [
        "tokenize",
        str(corpus),
        "--tokenizer",
        str(tokenizer_file),
        "--max-seq-length",
        "32",
        "--shard-mb",
        "0",
    ]
    replace = os.replace

    def renames(out: Path, allowed: int) -> list[str]:
        """Run until `allowed` renames are done: their names."""
        renamed: list[str] = []

        def counting(source: Path, target: Path) -> None:
            if len(renamed) == allowed:
                raise KeyboardInterrupt
            renamed.append(target.name)
            replace(source, target)

        with monkeypatch.context() as patch, suppress(SystemExit):
            patch.setattr(os, "replace", counting)
            main([*arguments, "--out", str(out)])
        return renamed

    whole = renames(tmp_path / "a", 99)
    assert (whole[0], whole[-1], len(whole) >= 12) == ("settings.json", "manifest.json", True)
    for moment in range(len(whole)):
        out = tmp_path / f"b{moment}"
        assert renames(out, moment) == whole[:moment]
        assert not (out / "manifest.json").exists()
        if moment and "examples_0_4.h5" not in whole[:moment]:
            (out / "examples_0_4.h5.partial").write_bytes(b"torn")
        main([*arguments, "--out", str(out)])
        assert contents(tmp_path / "a") == contents(out), moment
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    main([*arguments, "--out", str(tmp_path / "a")])  # done: nothing is written
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    with pytest.raises(InputError, match=r"output of other settings.*--overwrite"):
        main([*arguments, "--out", str(tmp_path / "a"), "--rows-per-file", "9"])
    main([*arguments, "--out", str(tmp_path / "a"), "--rows-per-file", "9", "--overwrite"])
    assert len(sequence_files(tmp_path / "a")) > 5


def test_bad_records(tmp_path: Path, tokenizer_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one two"}\n{"txt": 1}\n{"text": ""}\n{"text": "three"}\n')
    out = tmp_path / "out"
    arguments = [
        "tokenize",
        str(source),
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer_file),
        "--max-seq-length",
        "16",
    ]
    with pytest.raises(InputError, match=r"a\.jsonl:2: has no key 'text'"):
        main(arguments)
    assert not out.exists()  # nothing half-written
    main([*arguments, "--on-error", "skip"])
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["documents"], counts["documents_empty"], counts["rejected"]) == (2, 1, 1)
    (reject,) = map(json.loads, (out / "rejects.jsonl").open())
    assert (reject["file"], reject["place"]) == (str(source), "2")


def test_one_line_and_exit_2(tmp_path: Path, tokenizer_file: Path, repo_root: Path) -> None:
    """Through the real command, with worker processes: one line, no traceback, exit 2."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\nnonsense\n')
    command = [sys.executable, "-m", "tools.cli", "data", "tokenize", str(tmp_path), "--out", str(tmp_path / "out"),
               "--tokenizer", str(tokenizer_file), "--processes", "2", "--shard-mb", "0"]  # fmt: skip
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert ".jsonl:2: is not JSON" in line
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_safe(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    arguments = [
        "tokenize",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "home"),
        "--tokenizer",
        str(tokenizer_file),
    ]
    for extra in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="another --out"):
            main([*arguments, *extra])
    assert (tmp_path / "home/thesis.tex").exists()


class Killed(BaseException):
    """Stands for the process's end."""


def die(*_: object) -> None:
    raise Killed


def test_inputs_are_safe(corpus: Path, tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--overwrite into the folder of the inputs, one around it, or the one that links to them lead to.

    Planted: no `_spare_inputs` -> the inputs are deleted, fails.
    """
    monkeypatch.chdir(tmp_path)
    tokenizer = ["--tokenizer", str(tokenizer_file)]
    shutil.copytree(corpus, "work/corpus")
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a", "b"]}), "parquet/a.parquet")
    main(["parquet2jsonl", "parquet", "--out", "lines"])
    main(["tokenize", "work/corpus", "--out", "rows", *tokenizer, "--max-seq-length", "32"])
    main(["shuffle", "rows", "--out", "mixed", "--files", "3"])
    main(["split", "mixed"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command, out in (
        (["fim", "rows", "--rate", "0.5", *tokenizer], "rows"),
        (["fim", "rows", "--rate", "0.5", *tokenizer], "../" + tmp_path.name),
        (["subset", "rows", "--ranges", "0-0.5"], "rows"),
        (["shuffle", "rows", "--files", "2"], "rows"),
        (["shuffle", "mixed_part0of2", "--files", "2"], "mixed"),
        (["tokenize", "lines", *tokenizer], "lines"),
        (["partition", "lines", "--valid", "0.5"], "lines"),
        (["parquet2jsonl", "parquet"], "parquet"),
    ):
        with pytest.raises(InputError, match="name another"):
            main([*command, "--out", out, "--overwrite"])
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, command


def test_an_input_that_changes_and_keeps_its_size(tmp_path: Path, tokenizer_file: Path) -> None:
    """Near its start or its end; a changed time is no change. Planted: size alone -> "already done", fails."""
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = "".join(json.dumps({"text": f"{number:06d} " * 30}) + "\n" for number in range(1000))
    path.write_text(lines)
    command = ["tokenize", str(path), "--out", str(out), "--tokenizer", str(tokenizer_file)]
    main(command)
    os.utime(path, (1, 1))
    main(command)
    for old, new in (("000003", "000004"), ("000998", "000999")):
        path.write_text(lines.replace(old, new, 1))
        with pytest.raises(InputError, match="the output of other settings or inputs"):
            main(command)
    path.write_text(lines)
    main(command)


def test_out_below_the_inputs(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """Tokenising may write there, and a relaunch does not take what a killed run has left for texts; where a relaunch
    would read its own output, it is refused at once.

    Planted: `.tasks` searched for texts -> the relaunch is refused as other settings, fails.
    """
    source = tmp_path / "in"
    shutil.copytree(corpus, source)
    tokenize = ["tokenize", str(source), "--out", str(source / "out"), "--tokenizer", str(tokenizer_file)]
    main(tokenize)
    whole = contents(source / "out")
    shutil.rmtree(source / "out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("data_prep.engine.write_manifest", die)
        with pytest.raises(Killed):
            main(tokenize)
    assert list((source / "out/.tasks").glob("*.json"))
    main(tokenize)
    assert contents(source / "out") == whole
    main(["shuffle", str(source / "out"), "--out", str(tmp_path / "mixed"), "--files", "1"])
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text("{}\n")
    for command, given, option in (
        ("shuffle", source / "out", "--files=1"),
        ("partition", tmp_path / "lines", "--valid=0.5"),
    ):
        with pytest.raises(InputError, match="--out lies among the inputs"):
            main([command, str(given), option, "--out", str(given / "x")])
    file = next(source.rglob("*.parquet"))
    with pytest.raises(InputError, match="is named twice among the inputs"):
        main(["tokenize", str(source), str(file), "--out", str(tmp_path / "x"), "--tokenizer", str(tokenizer_file)])


def test_split_and_inspect(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "tokenize",
            str(corpus),
            "--out",
            str(tmp_path / "tok"),
            "--tokenizer",
            str(tokenizer_file),
            "--max-seq-length",
            "32",
        ]
    )
    main(["shuffle", str(tmp_path / "tok"), "--out", str(tmp_path / "shuffled"), "--files", "5"])
    main(["split", str(tmp_path / "shuffled")])
    even, odd = (sequence_files(tmp_path / f"shuffled_part{half}of2") for half in range(2))
    assert [p.name for p in even] == ["data-00000.h5", "data-00002.h5", "data-00004.h5"]
    assert [p.name for p in odd] == ["data-00001.h5", "data-00003.h5"]
    assert os.readlink(odd[0]) == "../shuffled/data-00001.h5"
    main(["split", str(tmp_path / "shuffled")])  # again: the same
    main(["split", str(tmp_path / "tok")])  # names without a number: by their place
    capsys.readouterr()
    main(["inspect", str(tmp_path / "shuffled"), "--tokenizer", str(tokenizer_file), "--sample", "1"])
    shown = capsys.readouterr().out
    counts = json.loads((tmp_path / "shuffled/manifest.json").read_text())["counts"]
    assert str(counts["sequences"]) in shown
    assert re.search(r"not well formed\W+0\W", shown)
    with pytest.raises(InputError, match="--sample 99999"):
        main(["inspect", str(tmp_path / "shuffled"), "--tokenizer", str(tokenizer_file), "--sample", "99999"])


def test_fim_refuses_the_wrong_tokenizer(corpus: Path, tmp_path: Path, tokenizer_file: Path, shared: Path) -> None:
    fim = ["fim", "--tokenizer", str(tokenizer_file), "--rate", "1", "--out"]
    with pytest.raises(InputError, match=r"examples_0_0.h5: row 0: id \d+ is no text of"):
        main([*fim, str(tmp_path / "a"), str(shared / "fixtures/data/out/tok/s3_2048_css")])
    tokenize = ["tokenize", str(corpus), "--tokenizer", str(tokenizer_file), "--max-seq-length", "64"]
    main([*tokenize, "--out", str(tmp_path / "tok")])
    main([*fim, str(tmp_path / "b"), str(tmp_path / "tok")])
    with pytest.raises(InputError, match="FIM marks already"):
        main([*fim, str(tmp_path / "c"), str(tmp_path / "b/epoch_0")])


def test_fim_of_the_reference_windows(tmp_path: Path, shared: Path) -> None:
    """On the reference's own windows: every label follows, every middle is whole, few tokens found no room."""
    llama = shared / "data/llama_tokenizer.json"
    source = shared / "fixtures/data/out/tok/star_2048_p1"
    main(["fim", str(source), "--out", str(tmp_path / "fim"), "--tokenizer", str(llama), "--rate", "0.9"])
    tokenizer = load_tokenizer(llama)
    fim = tokenizer.fim_ids
    before = SequenceFile(source / "examples_0_0.h5")
    after = SequenceFile(tmp_path / "fim/epoch_0/examples_0_0.h5")
    assert len(after) == len(before) == 78
    for row in after.rows():
        counted = row[1].astype(bool)
        assert np.array_equal(row[2][:-1][counted[1:]], row[0][1:][counted[1:]])
        marks = [i for i in row[0] if i in (fim.prefix, fim.suffix, fim.middle)]
        assert marks == [fim.prefix, fim.suffix, fim.middle] * (len(marks) // 3)
    counts = json.loads((tmp_path / "fim/manifest.json").read_text())["counts"]
    assert 0.8 < counts["texts_transformed"] / counts["texts"] < 0.97
    assert counts["tokens_dropped"] < 10 * len(before)


def test_an_overwrite_that_dies_leaves_nothing_to_trust(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the folder deleted where it is -> its manifest outlives its files, the relaunch does nothing, fails."""
    arguments = ["tokenize", str(corpus), "--out", str(tmp_path / "a"), "--tokenizer", str(tokenizer_file)]
    main([*arguments, "--max-seq-length", "64"])
    whole = contents(tmp_path / "a")

    def die_halfway(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            for path in sequence_files(folder):
                path.unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("data_prep.engine.shutil.rmtree", die_halfway)
        with pytest.raises(Killed):
            main([*arguments, "--max-seq-length", "64", "--overwrite"])
    main([*arguments, "--max-seq-length", "64"])
    assert contents(tmp_path / "a") == whole
    main([*arguments, "--max-seq-length", "32", "--overwrite"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
