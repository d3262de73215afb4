"""No option of the two tokenising doors is parsed and ignored: each has a value here that changes what is checked.

The tables are complete: an option that is added without a line here fails the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
import yaml

from data_prep import commands, fim_hdf5_stage2, fim_hdf5_stage3
from data_prep.create_hdf5_dataset import OPTIONS
from data_prep.create_hdf5_dataset import main as lmdata
from data_prep.errors import InputError
from data_prep.packing import unpack
from data_prep.sequences import SequenceFile
from data_prep.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "The quick  brown fox , jumped @-@ over “the” lazy dog. " * 3,
    "def add(first): return e\u0301",
    "x",
    "12 . 5",
] * 4
LENGTH = 16


class Result(NamedTuple):
    """What a run left: files, rows (n, 3, L), manifest, data_params.json, and what it printed."""

    names: list[str]
    rows: np.ndarray
    manifest: dict[str, Any]
    parameters: dict[str, dict[str, Any]]
    printed: str

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The documents, decoded."""
        return [tokenizer.decode(document[1:-1]) for document in unpack(iter(self.rows), tokenizer.eos_id)]

    @property
    def tails(self) -> np.ndarray:
        """Positions that are not counted, by row."""
        return (self.rows[:, 1] == 0).sum(axis=1)


def result(out: Path, printed: str = "") -> Result:
    files = sorted(out.rglob("*.h5"))
    rows = [row for path in files for row in SequenceFile(path).rows()]
    parameters = out / "data_params.json"
    return Result(
        [path.relative_to(out).as_posix() for path in files],
        np.stack(rows) if rows else np.empty((0, 3, LENGTH), np.int32),
        json.loads((out / "manifest.json").read_bytes()),
        json.loads(parameters.read_bytes()) if parameters.exists() else {},
        printed,
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `in` (two files), `other` (one), a list of files, and a file of another key."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("in/a.jsonl", TEXTS), ("in/b.jsonl", TEXTS[:3]), ("other/c.jsonl", ["other text"])):
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text, "body": f"body {text}"}) + "\n" for text in texts))
    Path("in/code.py").write_text("print('code')\n")
    Path("files.meta").write_text("in/b.jsonl\n")
    return tmp_path


# --- python data_prep/create_hdf5_dataset.py LMData ---


class Case(NamedTuple):
    """An option's other value, what must be given with it, and how (plain run, run with it) must differ."""

    value: Any
    differs: Callable[[Result, Result, Tokenizer], bool]
    beside: dict[str, Any] = {}  # noqa: RUF012 - a tuple's default, never written to


def more_files(plain: Result, other: Result, _: Tokenizer) -> bool:
    same = sorted(row.tobytes() for row in plain.rows) == sorted(row.tobytes() for row in other.rows)
    return same and len(other.names) == -(-len(plain.rows) // 3)


def refused(value: Any, **beside: Any) -> Case:
    return Case(value, lambda plain, other, tokenizer: False, beside)


# In the default mode. None: what this mode does not do, it refuses (REFUSED) or says (NOTED).
DEFAULT: dict[str, Case] = {
    "input_dir": Case("other", lambda p, o, t: o.texts(t) == ["other text"]),
    "metadata_files": Case("files.meta", lambda p, o, t: o.texts(t)[:2] == TEXTS[:2] and len(o.texts(t)) < 4),
    "output_dir": Case("out2", lambda p, o, t: Path("out2/manifest.json").exists()),
    "encoder_file": Case("sparse.json", lambda p, o, t: o.rows.shape[0] > p.rows.shape[0]),
    "eos_id": Case(2, lambda p, o, t: np.array_equal(p.rows, o.rows)),  # another is refused, see REFUSED
    "pad_id": Case(5, lambda p, o, t: (p.rows[-1, 0, -1], o.rows[-1, 0, -1]) == (2, 5)),
    "max_seq_length": Case(8, lambda p, o, t: o.rows.shape[2] == 8),
    "output_name": Case("rows", lambda p, o, t: o.names == ["rows_0_0.h5"]),
    "files_per_record": Case(3, more_files),
    "use_ftfy": Case(True, lambda p, o, t: '"the"' in o.texts(t)[0] and "“the”" in p.texts(t)[0]),
    "ftfy_normalizer": Case("NFD", lambda p, o, t: p.texts(t) != o.texts(t), {"use_ftfy": True}),
    "wikitext_detokenize": Case(True, lambda p, o, t: "fox, jumped-over" in o.texts(t)[0]),
    "min_sequence_len": Case(17, lambda p, o, t: len(o.rows) == len(p.rows) - 1
                             and o.manifest["counts"]["tokens_dropped"] == int(p.rows[-1, 1].sum())),
    "jsonl_key": Case("body", lambda p, o, t: o.texts(t)[0] == f"body {TEXTS[0]}"),
}  # fmt: skip
# What would lose text, and what is unknown, is refused.
REFUSED: dict[str, Any] = {
    "eos_id": 5,
    "pad_id": 10_000,
    "short_seq_prob": 0.5,
    "inverted_mask": True,
    "pack_sequences": False,
    "write_remainder": False,
    "tokenizer_type": "GPT2Tokenizer",
    "dataset_processor": "Summarization",
    "ftfy_normalizer": "NFX",
    "chunk_len_to_split": 0,
    "max_seq_length": 0,
    "files_per_record": 0,
    "processes": -1,
}
# Asks for something that is not done: a line says so.
NOTED: dict[str, Any] = {"module": "mine", "sep_token": "<sep>", "split_text_to_tokenize": True}
# With --reference-compat.
COMPAT: dict[str, Case] = {
    "short_seq_prob": Case(0.5, lambda p, o, t: p.tails.max() == 0 and 0 < (o.tails > 0).sum() < len(o.rows)),
    "seed": Case(45, lambda p, o, t: not np.array_equal(p.rows, o.rows), {"short_seq_prob": 0.5}),
    "write_remainder": Case(False, lambda p, o, t: len(o.rows) == len(p.rows) // 4 * 4 < len(p.rows),
                            {"files_per_record": 4}),
    "split_text_to_tokenize": Case(True, lambda p, o, t: (o.rows == t.bos_id).sum() > (p.rows == t.bos_id).sum(),
                                   {"chunk_len_to_split": 20}),
    "chunk_len_to_split": Case(5, lambda p, o, t: (o.rows == t.bos_id).sum() > (p.rows == t.bos_id).sum(),
                               {"split_text_to_tokenize": True}),
    "remove_bos_in_chunks": Case(True, lambda p, o, t: (o.rows == t.bos_id).sum() < (p.rows == t.bos_id).sum(),
                                 {"split_text_to_tokenize": True, "chunk_len_to_split": 20}),
    "pack_sequences": Case(False, lambda p, o, t: p.tails.max() == 0 and (o.rows[:, 0, 0] == t.bos_id).sum() > 10),
    "inverted_mask": Case(True, lambda p, o, t: np.array_equal(o.rows[:, 1], 1 - p.rows[:, 1])),
    "min_sequence_len": Case(14, lambda p, o, t: o.parameters["post-process"]["discarded_files"]
                             > p.parameters["post-process"]["discarded_files"], {"pack_sequences": False}),
    "processes": Case(2, lambda p, o, t: o.names == ["examples_0_0.h5", "examples_0_1.h5"]),
}  # fmt: skip
# The same bytes whatever they say: how it is written, whether a bar is shown, and (by default) the number of processes.
# Each is still checked: written down in data_params.json, handed on to the engine.
SAME = ("write_in_batch", "resume_from_checkpoint", "display_pbar")


def run_lmdata(given: dict[str, Any], capsys: pytest.CaptureFixture[str], *, by_file: bool, compat: bool) -> Result:
    """One run; the options come from a configuration file or from flags."""
    given = {"input_dir": "in", "output_dir": "out", "max_seq_length": LENGTH, "eos_id": 2} | given
    flags = ["--overwrite", *(["--reference-compat"] if compat else [])]
    if by_file:
        config: dict[str, dict[str, Any]] = {"setup": {}, "processing": {}, "dataset": {}}
        for name, value in given.items():
            config[OPTIONS[name].section][name] = value
        Path("config.yaml").write_text(yaml.safe_dump(config))
        flags += ["--params", "config.yaml"]
    else:
        flags += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    capsys.readouterr()
    lmdata(["LMData", *flags])
    return result(Path(given["output_dir"]), capsys.readouterr().out)


@pytest.fixture
def lmdata_place(place: Path, template_tokenizer: Path) -> Path:
    definition = json.loads(template_tokenizer.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:20]
    (place / "sparse.json").write_text(json.dumps(definition))
    (place / "tokenizer.json").write_bytes(template_tokenizer.read_bytes())
    return place


def test_every_option_of_the_reference_is_in_a_table() -> None:
    assert {*DEFAULT, *REFUSED, *NOTED, *COMPAT, *SAME} == set(OPTIONS)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("name", DEFAULT)
def test_default(lmdata_place: Path, name: str, by_file: bool, capsys: pytest.CaptureFixture[str]) -> None:
    case = DEFAULT[name]
    before = {"encoder_file": "tokenizer.json"} | case.beside
    plain = run_lmdata(before, capsys, by_file=by_file, compat=False)
    other = run_lmdata(before | {name: case.value}, capsys, by_file=by_file, compat=False)
    assert case.differs(plain, other, load_tokenizer("tokenizer.json"))


@pytest.mark.parametrize("name", COMPAT)
def test_compat(lmdata_place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of them count on the command line only, there as here (test_reference_compat.py)."""
    case = COMPAT[name]
    before = {"encoder_file": "tokenizer.json", "use_ftfy": False} | case.beside
    plain = run_lmdata(before, capsys, by_file=False, compat=True)
    other = run_lmdata(before | {name: case.value}, capsys, by_file=False, compat=True)
    assert case.differs(plain, other, load_tokenizer("tokenizer.json"))
    section = OPTIONS[name].section
    assert other.parameters[section][name] == case.value


@pytest.mark.parametrize("name", REFUSED)
def test_refused(lmdata_place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By its name, and nothing is written."""
    with pytest.raises(InputError, match=f"--{name} "):
        run_lmdata({"encoder_file": "tokenizer.json", name: REFUSED[name]}, capsys, by_file=False, compat=False)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", NOTED)
def test_noted(lmdata_place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"encoder_file": "tokenizer.json"}
    plain = run_lmdata(before, capsys, by_file=True, compat=False)
    other = run_lmdata(before | {name: NOTED[name]}, capsys, by_file=True, compat=False)
    assert np.array_equal(plain.rows, other.rows)
    assert f"note: {name} {NOTED[name]}: " in other.printed
    assert "note:" not in plain.printed


@pytest.mark.parametrize("name", SAME)
def test_the_same_arrays(
    lmdata_place: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        value: run_lmdata({"encoder_file": "tokenizer.json", name: value}, capsys, by_file=True, compat=True)
        for value in (False, True)
    }
    assert np.array_equal(runs[False].rows, runs[True].rows)
    assert [runs[value].parameters["processing"][name] for value in (False, True)] == [False, True]
    if name == "display_pbar":
        shown = []
        monkeypatch.setattr("data_prep.engine.sys.stderr.isatty", lambda: shown.append(True), raising=False)
        for value in (False, True):
            run_lmdata(
                {"encoder_file": "tokenizer.json", name: value, "processes": 2}, capsys, by_file=True, compat=True
            )
        assert shown == [True]  # asked whether there is a terminal once: with True


# --- crystalcoder data tokenize ---

# option -> (its words, what else both runs have, how the runs must differ)
TOKENIZE: dict[str, tuple[list[str], list[str], Callable[[Result, Result, Tokenizer], bool]]] = {
    "inputs": (["other"], [], lambda p, o, t: o.texts(t) == [*p.texts(t), "other text"]),
    "out": (["--out", "out2"], [], lambda p, o, t: Path("out2/manifest.json").exists()),
    "tokenizer": (["--tokenizer", "sparse.json"], [], lambda p, o, t: len(o.rows) > len(p.rows)),
    "max_seq_length": (["--max-seq-length", "8"], [], lambda p, o, t: o.rows.shape[2] == 8),
    "text_key": (["--text-key", "body"], [], lambda p, o, t: o.texts(t)[0] == f"body {TEXTS[0]}"),
    "text_suffixes": (["--text-suffixes", ".py"], [], lambda p, o, t: "print('code')\n" in o.texts(t)),
    "fim_rate": (["--fim-rate", "1"], [], lambda p, o, t: (o.rows[:, 0] == t.fim_ids.middle).sum() > 10),
    "fim_spm_rate": (["--fim-spm-rate", "1"], ["--fim-rate", "1", "--fim-spm-rate", "0"],
                     lambda p, o, t: after_prefix_comes_suffix(o, t) and not after_prefix_comes_suffix(p, t)),
    "fim_level": (["--fim-level", "token"], ["--fim-rate", "1"], lambda p, o, t: not np.array_equal(p.rows, o.rows)),
    "epochs": (["--epochs", "2"], ["--fim-rate", "1"],
               lambda p, o, t: o.names == ["epoch_0/examples_0_0.h5", "epoch_1/examples_0_0.h5"]),
    "seed": (["--seed", "1"], ["--fim-rate", "1"], lambda p, o, t: not np.array_equal(p.rows, o.rows)),
    "ftfy": (["--ftfy"], [], lambda p, o, t: '"the"' in o.texts(t)[0] and "“the”" in p.texts(t)[0]),
    "ftfy_normalizer": (["--ftfy-normalizer", "NFD"], ["--ftfy"], lambda p, o, t: p.texts(t) != o.texts(t)),
    "wikitext_detokenize": (["--wikitext-detokenize"], [], lambda p, o, t: "fox, jumped-over" in o.texts(t)[0]),
    "min_sequence_len": (["--min-sequence-len", "17"], [], lambda p, o, t: len(o.rows) == len(p.rows) - 1),
    "pad_id": (["--pad-id", "5"], [], lambda p, o, t: (p.rows[-1, 0, -1], o.rows[-1, 0, -1]) == (2, 5)),
    "output_name": (["--output-name", "rows"], [], lambda p, o, t: o.names == ["rows_0_0.h5"]),
    "rows_per_file": (["--rows-per-file", "3"], [], more_files),
    "shard_mb": (["--shard-mb", "0"], [], lambda p, o, t: o.names == ["examples_0_0.h5", "examples_0_1.h5"]),
    "on_error": (["--on-error", "skip"], [], lambda p, o, t: True),  # test_faults.py
    "processes": (["--processes", "2"], ["--shard-mb", "0"], lambda p, o, t: np.array_equal(p.rows, o.rows)),
    "overwrite": (["--overwrite"], [], lambda p, o, t: np.array_equal(p.rows, o.rows)),
    "engine": (["--engine", "local"], [], lambda p, o, t: np.array_equal(p.rows, o.rows)),  # test_cluster.py
    "engine_option": ([], [], lambda p, o, t: True),
}  # fmt: skip


def after_prefix_comes_suffix(run: Result, tokenizer: Tokenizer) -> bool:
    """Always: in the order prefix-suffix-middle only if the prefix is empty."""
    stream = run.rows[:, 0].ravel()
    return bool((stream[1:][stream[:-1] == tokenizer.fim_ids.prefix] == tokenizer.fim_ids.suffix).all())


def run_tokenize(*words: str) -> Result:
    """One run; of an option given twice the last counts."""
    main = ["tokenize", "in", "--out", "out", "--tokenizer", "tokenizer.json", "--max-seq-length", str(LENGTH)]
    commands.main([*main, "--overwrite", *words])
    return result(Path("out2" if "out2" in words else "out"))


def test_every_option_of_tokenize_is_in_the_table() -> None:
    group: Any = typer.main.get_command(commands.app)
    assert {parameter.name for parameter in group.commands["tokenize"].params} == set(TOKENIZE)


@pytest.mark.parametrize("name", TOKENIZE)
def test_tokenize(lmdata_place: Path, name: str) -> None:
    words, beside, differs = TOKENIZE[name]
    plain, other = run_tokenize(*beside), run_tokenize(*beside, *words)
    assert differs(plain, other, load_tokenizer("tokenizer.json"))
    if name == "engine_option":
        with pytest.raises(InputError, match="--engine-option"):
            run_tokenize("--engine-option", "a=b")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tokenize in --out out --tokenizer {} --epochs -1", "--epochs"),
        ("tokenize in --out out --tokenizer {} --fim-spm-rate 7", "--fim-spm-rate"),
        ("tokenize in --out out --tokenizer {} --shard-mb -3", "--shard-mb"),
        ("tokenize in --out out --tokenizer {} --min-sequence-len -3", "--min-sequence-len"),
        ("tokenize in --out out --tokenizer {} --output-name ../a", "--output-name '../a'"),
        ("tokenize in --out out --tokenizer {} --output-name=", "--output-name ''"),
        (
            "fim rows --out out --tokenizer {} --rate 0.5 --reference-compat --level token",
            "--level token: the reference",
        ),
        ("fim rows --out out --tokenizer {} --rate 0.5 --reference-compat --seed -1", "--seed -1: with --reference"),
        ("verify rows --vocab-size 0", "--vocab-size"),
        ("locate rows 0 --characters -5", "--characters"),
        ("inspect rows --sample 3", "--sample 3: name the --tokenizer"),
        ("split rows/examples_0_0.h5", "is a file"),
        ("build recipe.yaml", r"steps\[1\] \(shuffle\): Invalid value for '--files'"),
    ],
)
def test_out_of_range(
    place: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    """Planted: no limit for --shard-mb -> parts without end; for the others -> accepted, or not used: fails."""
    commands.main(["tokenize", "in", "--out", "rows", "--tokenizer", str(tokenizer_file), "--max-seq-length", "16"])
    recipe = {
        "steps": [
            {"run": "tokenize", "in": "in", "out": "a", "options": {"tokenizer": str(tokenizer_file)}},
            {"run": "shuffle", "in": "a", "out": "b", "options": {"files": 0}},
        ]
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(place.rglob("*"))
    capsys.readouterr()
    with pytest.raises((InputError, SystemExit)) as stop:
        commands.main(command.format(tokenizer_file).split())
    told = str(stop.value) if isinstance(stop.value, InputError) else capsys.readouterr().err
    assert re.search(message, told), told
    assert sorted(place.rglob("*")) == before  # nothing is begun


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (b"setup: [1]", "", r"section 'setup' is \[1\]"),
        (b"[1]", "", "holds no sections"),
        (b"\xff\xfe\xff", "", "is not YAML"),
        (b"", "--metadata_files config.yaml", "config.yaml: lists no files"),
        (b"# \xff", "--metadata_files binary.meta --input_dir in", "binary.meta: byte 0: is not UTF-8"),
        (b"", "--short_seq_prob 2 --reference-compat --eos_id 2", "is a probability"),
        (b"", "--output_name a/b", "--output_name 'a/b'"),
    ],
)
def test_the_reference_door_is_told(place: Path, tokenizer_file: Path, config: bytes, flags: str, message: str) -> None:
    """Planted: a section that is no mapping, or bytes that are not UTF-8, read as they are -> a traceback, fails."""
    Path("config.yaml").write_bytes(config if config[:1] != b"#" else b"")
    Path("binary.meta").write_bytes(b"\xff\n")
    command = ["LMData", "--params", "config.yaml", "--encoder_file", str(tokenizer_file), "--output_dir", "out"]
    with pytest.raises(InputError, match=message):
        lmdata([*command, "--input_dir", "in", *flags.split()])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (fim_hdf5_stage2, "--reference-compat --reference-processes -3", "--reference-processes -3: at least 1"),
        (fim_hdf5_stage2, "--files examples_0_0.h5,examples_0_0.h5", "would be written twice"),
        (fim_hdf5_stage3, "--languages .,.", "would be written twice"),
    ],
)
def test_the_fim_doors_are_told(place: Path, tokenizer_file: Path, stage: Any, flags: str, message: str) -> None:
    """Planted: not looked for -> division by zero; two tasks that write the same file: fails."""
    commands.main(["tokenize", "in", "--out", "rows", "--tokenizer", str(tokenizer_file), "--max-seq-length", "16"])
    with pytest.raises(InputError, match=message):
        stage.main(["--input_dir", "rows", "--output_dir", "out", "--tokenizer", str(tokenizer_file), *flags.split()])
    assert not (place / "out").exists()
