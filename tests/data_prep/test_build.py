"""`data build`: a phase's folders from raw ones, resumed wherever it was stopped; bad recipes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from data_prep import commands
from data_prep.build import find_recipe, load_recipe
from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.sequences import sequence_files
from data_prep.verification import verify
from support.tiny_tokenizer import TEXT

SOURCES = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
LANGUAGES = ("css", "html", "javascript", "python", "rust")
SMALL = ["--set", "max_seq_length=64", "--set", "files=3"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """The two corpora as they come from the hub, a few kilobytes of each."""
    root = tmp_path_factory.mktemp("root")
    shutil.copy(tokenizer_file, root / "tokenizer.json")
    generator = np.random.default_rng(0)
    words = TEXT.split(" ")

    def text() -> str:
        return " ".join(generator.choice(words, 50))

    for part in ("train", "validation"):
        for chunk in range(2):
            records = [{"text": text(), "meta": {"redpajama_set_name": f"RedPajama{source}"}} for source in SOURCES * 5]
            path = root / f"raw/SlimPajama-627B/{part}/chunk{chunk}/example_0.jsonl.zst"
            path.parent.mkdir(parents=True)
            path.write_bytes(zstandard.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    for language in LANGUAGES:
        path = root / f"raw/starcoderdata/{language}/train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"id": range(20), "content": [text() for _ in range(20)]}), path)
    return root


def copy_of(raw: Path, folder: Path) -> Path:
    shutil.copytree(raw, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def folders_of(phase: int, repo_root: Path) -> set[str]:
    """The data directories that a phase's params.yaml names."""
    params = yaml.safe_load((repo_root / f"params/phase{phase}/params.yaml").read_text())
    evaluation = params["eval_input"]["data_dir"]
    mixture = [entry["data_dir"] for entry in params["train_input"]["mixture"]]
    return {*mixture, *([evaluation] if isinstance(evaluation, str) else evaluation)}


def test_recipes_make_what_the_phases_name(
    raw: Path, tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each phase's recipe in one root after the other: every folder of its params.yaml, sound; nothing done twice."""
    root = copy_of(raw, tmp_path / "root")
    for phase in (1, 2, 3):
        held_out = ["--set", "valid=0.3"] if phase > 1 else []
        main(["build", f"crystalcoder_phase{phase}", "--root", str(root), *SMALL, *held_out])
        for folder in folders_of(phase, repo_root):
            assert sequence_files(root / folder), folder
            assert verify(root / folder) == [], folder
        # Nothing but work/ and what some phase names, or its whole where it names the halves.
        made = {step for step in load_recipe(find_recipe(f"crystalcoder_phase{phase}"), {}) if step.out}
        named = {folder.split("_part")[0] for folder in folders_of(phase, repo_root)}
        assert {step.out for step in made if not str(step.out).startswith("work/")} - named <= {
            f"SlimPajama/{source}_train_packed" for source in SOURCES
        }
    capsys.readouterr()
    before = {p: p.lstat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    main(["build", "recipes/crystalcoder_phase2.yaml", "--root", str(root), *SMALL, "--set", "valid=0.3"])
    assert before == {p: p.lstat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert capsys.readouterr().err.count("already done") == 2 + 7 + 7 + 1 + 4


RECIPE = """
values: {tokenizer: tokenizer.json, files: 2}
steps:
- run: parquet2jsonl
  in: raw/starcoderdata
  out: jsonl
- run: tokenize
  for: {language: [css, python], name: [one, two]}
  in: jsonl/{language}
  out: tokens/{name}
  options: {tokenizer: "{tokenizer}", max_seq_length: 64, fim-rate: 0.9, epochs: 2}
- run: shuffle
  in: [tokens/one, tokens/two]
  out: shuffled
  options: {files: "{files}"}
- run: split
  in: shuffled
"""


def test_relaunch_goes_on(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before each of its steps in turn, then launched again with two processes: the same bytes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    main(["build", str(recipe), "--root", str(copy_of(raw, tmp_path / "whole"))])
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("shuffled_part")]) == 2
    stopped = copy_of(raw, tmp_path / "stopped")
    for last in range(5):
        calls = iter(range(last))

        def stops(arguments: list[str], calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            main(arguments)

        with monkeypatch.context() as patch:
            patch.setattr(commands, "main", stops)
            with pytest.raises(SystemExit):
                main(["build", str(recipe), "--root", str(stopped)])
    main(["build", str(recipe), "--root", str(stopped), "--processes", "2"])
    assert contents(stopped) == whole


def test_dry_run(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan has every step, its state and sizes; nothing is written."""
    root = copy_of(raw, tmp_path / "root")
    big = root / "raw/starcoderdata/css/train-00000-of-00001.parquet"
    with big.open("r+b") as stream:
        stream.truncate(2_000_000_000)  # sparse: takes no space
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    before = contents(root / "raw/SlimPajama-627B"), sorted(root.iterdir())
    main(["build", str(recipe), "--root", str(root), "--dry-run", "--processes", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split("crystalcoder")[0].split()) for line in lines[:5]] == [
        "1 to do 2.00 GB -> ~6.00 GB ~10 s",
        "2 to do ~3.00 GB -> ~2.70 GB ~2.5 min",  # two folders within jsonl, taken as equal; two epochs
        "3 to do ~3.00 GB -> ~2.70 GB ~2.5 min",
        "4 to do ~5.40 GB -> ~5.40 GB ~23 s",
        "5 to do ~5.40 GB -> ~0.00 MB",
    ]
    assert lines[0].endswith("crystalcoder data parquet2jsonl raw/starcoderdata --out jsonl")
    assert lines[5].startswith("to be written: ~16.80 GB; free here: ")
    assert lines[6].startswith("time: ~5.5 min with --processes 4 (here are ")
    assert "tokenize 15" in lines[6]
    assert (contents(root / "raw/SlimPajama-627B"), sorted(root.iterdir())) == before
    (root / "tokenizer.json").unlink()
    main(["build", str(recipe), "--root", str(root), "--dry-run"])
    assert capsys.readouterr().out.splitlines()[-1] == "not there: tokenizer.json"
    with pytest.raises(InputError, match=r"recipe\.yaml: tokenizer\.json: not in .*root"):
        main(["build", str(recipe), "--root", str(root)])
    assert not (root / "jsonl").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("run: shuffle", "run: shufle", r"steps\[2\]\.run: Input should be 'parquet2jsonl', "),
        ("  out: jsonl", "  output: jsonl", r"steps\[0\]\.output: no such key: use run, in, out, options, for"),
        ("  out: jsonl\n", "", r"steps\[0\] \(parquet2jsonl\): out: add it"),
        ("  in: shuffled\n", "  in: shuffled\n  out: x\n", r"steps\[3\] \(split\): out: split names its folders"),
        ("fim-rate: 0.9", "fim-rat: 0.9", r"steps\[1\] \(tokenize\): No such option: --fim-rat .*--help"),
        ("fim-rate: 0.9", "fim-rate: much", r"steps\[1\] \(tokenize\): Invalid value for '--fim-rate'"),
        ("fim-rate: 0.9", "processes: 2", r"steps\[1\] \(tokenize\): options\.processes: is not for a recipe"),
        ('{tokenizer: "{tokenizer}", ', "{", r"steps\[1\] \(tokenize\): Missing option '--tokenizer'"),
        ("name: [one, two]", "name: [one]", r"steps\[1\] \(tokenize\): for: the lists language, name differ in length"),
        ("jsonl/{language}", "jsonl/{lang}", r"steps\[1\] \(tokenize\): {lang} has no value: add it to"),
        ("steps:", "step:", r"step: no such key: use values, steps"),
        ("values: {", "values: {{", r"is not a YAML file \("),
    ],
)
def test_bad_recipes(raw: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert RECIPE.count(old) == 1
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(InputError, match=rf"recipe\.yaml: {message}"):
        main(["build", str(recipe), "--root", str(raw)])
    assert not (raw / "jsonl").exists()


def test_bad_command_lines(raw: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["no_such"], r"no_such: no such recipe: .* crystalcoder_phase1, crystalcoder_phase2, crystalcoder_phase3"),
        (["crystalcoder_phase1", "--set", "file=3"], r"--set file: .* has no such value, but tokenizer, "),
        (["crystalcoder_phase1", "--set", "files"], "--set files: is not name=value"),
        (["crystalcoder_phase1", "--root", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            main(["build", *arguments])


def test_a_share_that_is_none(tmp_path: Path, tokenizer_file: Path) -> None:
    """A folder that an earlier step was to fill and has not: the step is named, and what to change.

    Planted: left to the step -> "no such file or folder" alone, fails.
    """
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "a"}\n' * 3)
    steps = [
        {"run": "partition", "in": "in", "out": "split", "options": {"valid": "{valid}"}},
        {"run": "tokenize", "in": "split/valid", "out": "rows", "options": {"tokenizer": "tokenizer.json"}},
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"values": {"valid": 0.00001}, "steps": steps}))
    command = ["build", str(tmp_path / "recipe.yaml"), "--root", str(tmp_path)]
    with pytest.raises(
        InputError, match=r"steps\[1\] \(tokenize\): split/valid: no step before .*--set changes shares"
    ):
        main(command)
