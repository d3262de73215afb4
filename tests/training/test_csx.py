"""`crystalcoder pretrain --target CSX`: modelzoo's exact command, run where modelzoo is, explained where it is not."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.training import csx
from tools import pretrain

# Stands in for modelzoo's entry point: writes down how it was called, and fails as told.
RUN_PY = """import sys
open("called", "w").write(repr(sys.argv[1:]))
sys.exit(7)
"""


@pytest.fixture
def modelzoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "zoo" / csx.RUN_SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(RUN_PY)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for directory in ("mount", "data"):
        (tmp_path / directory).mkdir()
    (tmp_path / "init.mdl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo"


def printed_command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_the_launch_of_each_phase_word_by_word(
    repo_root: Path, modelzoo: Path, capsys: pytest.CaptureFixture[str], phase: int
) -> None:
    """The line that the reference's users typed. Planted: --num_workers_per_csx in both releases, fails."""
    params = str(repo_root / f"params/phase{phase}/params.yaml")
    paths = ["--python_paths", "zoo", "--mount_dirs", "mount", "data", "--model_dir", "out"]
    given = ["--target", "CSX", "--params", params, "--modelzoo", "zoo", *paths, "--dry-run"]
    start = ["python", "zoo/modelzoo/transformers/pytorch/gpt3/run.py", "CSX", "--mode", "train", "--num_csx", "16"]
    end = ["--params", params, *paths]
    pretrain.main(given)
    assert printed_command(capsys) == [*start, "--num_workers_per_csx", "1", *end]
    pretrain.main([*given, "--release=2.0", "--checkpoint_path", "init.mdl"])
    assert printed_command(capsys) == [*start, *end, "--checkpoint_path", "init.mdl"]


def test_a_dry_run_anywhere_says_what_is_missing(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    params = repo_root / "params/phase2/params.yaml"
    pretrain.main(["--target=CSX", "--params", str(params), "--dry-run"])
    out, err = capsys.readouterr()
    assert "--python_paths PYTHON_PATHS --mount_dirs MOUNT_DIRS --model_dir model_dir_phase2" in out
    assert [line.split(":")[1].strip() for line in err.splitlines() if "python: " not in line] == [
        "modelzoo",
        "python_paths",
        "mount_dirs",
        "data",
    ]
    assert f"{params}:15: there is no directory SlimPajama/ArXiv_train_packed_part1of2 (and 7 more)" in err
    with pytest.raises(SystemExit) as stop:  # without --dry-run nothing is started, and that is an error
        pretrain.main(["--target", "CSX", "--params", str(params)])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "run.py CSX" in out
    assert err.startswith("error: not started: modelzoo: ")
    assert err.count("\n") == 1


def test_modelzoo_is_run_and_its_exit_code_kept(repo_root: Path, modelzoo: Path) -> None:
    text = (repo_root / "params/tiny/phase1.yaml").read_text()
    Path("params.yaml").write_text(text.replace("data/prose", "data").replace("data/code", "data"))
    given = ["--params", "params.yaml", "--modelzoo", "zoo", "--mount_dirs", "mount", "--num_csx", "2"]
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--target", "CSX", *given])
    assert stop.value.code == 7
    called = Path("called").read_text()
    assert called.startswith("['CSX', '--mode', 'train', '--num_csx', '2', '--num_workers_per_csx', '1', '--params'")
    assert repr(str(modelzoo)) in called  # python_paths follows --modelzoo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modelzoo", "mount"], "--modelzoo mount: has no modelzoo/transformers/pytorch/gpt3/run.py"),
        (["--mount_dirs", "mount", "nowhere"], "--mount_dirs nowhere: there is no such directory"),
        (["--python_paths", "nowhere"], "--python_paths nowhere: there is no such directory"),
        (["--checkpoint_path", "nowhere"], "--checkpoint_path nowhere: there is no such file"),
        (["--model_dir", "init.mdl"], "--model_dir init.mdl: is a file"),
        (["--release", "2.0", "--num_workers_per_csx", "1"], "an option of release 1.9 only"),
        (["--num_csx", "0"], "--num_csx 0: must be at least 1"),
        (["--release", "3"], "argument --release: invalid choice"),
        (["--tp", "2"], "unrecognized arguments: --tp 2"),
        (["runconfig.max_steps=3"], "runconfig.max_steps=3: overrides do not reach modelzoo"),
    ],
)
def test_bad_input_is_one_line(
    repo_root: Path, modelzoo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        csx.main(["--params", str(repo_root / "params/phase1/params.yaml"), *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_wrong_file_and_a_wrong_target_are_refused(repo_root: Path, modelzoo: Path) -> None:
    text = (repo_root / "params/phase1/params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("mount_dirs: []", "mount_dirs: [/no/such]"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.cli",
            "pretrain",
            "--target",
            "CSX",
            "--params",
            str(Path("params.yaml").resolve()),
        ],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "mount_dirs /no/such: there is no such directory" in done.stderr
    assert "params.yaml:" in done.stderr
    with pytest.raises(InputError, match="--target GPU: CSX is the only one"):
        pretrain.main(["--target", "GPU"])
