"""What is wrong with data, sizes or checkpoint is said before a rank starts: file, line, key and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from support.pretraining import SMALL, S, V, write_data
from support.sequence_rows import write_h5


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, and one directory for each fault."""
    root = write_data(tmp_path_factory.mktemp("preflight"))
    write_h5(root / "long/x.h5", np.zeros((3, 3, 2 * S), dtype=np.int32))
    outside = np.zeros((3, 3, S), dtype=np.int32)
    outside[1, 0, 5] = V
    write_h5(root / "outside/x.h5", outside)
    (root / "no_data").mkdir()
    with h5py.File(root / "no_data/x.h5", "w") as file:
        file["tokens"] = np.zeros((3, 3, S), dtype=np.int32)
    (root / "empty").mkdir()
    return root


MIXTURE = "  - data_dir: data/prose\n"
CASES = {
    "missing": (MIXTURE, "  - data_dir: nowhere\n", [], ["train_input.mixture.0.data_dir", "nowhere: no such file"]),
    "no dataset": (MIXTURE, "  - data_dir: no_data\n", [], ["mixture.0.data_dir", "no_data/x.h5", "data"]),
    "no files": (MIXTURE, "  - data_dir: empty\n", [], ["mixture.0.data_dir", "empty: no .h5 or .jsonl file"]),
    "length": (MIXTURE, "  - data_dir: long\n", [], ["mixture.0.data_dir", "sequences of 64 tokens", "rows of 32"]),
    "vocabulary": (MIXTURE, "  - data_dir: outside\n", [], ["mixture.0.data_dir", "holds 128", "vocabulary of 128"]),
    "evaluation": (
        "  data_dir: data/val\n",
        "  data_dir: [data/val, nowhere]\n",
        ["--mode", "train_and_eval"],
        ["eval_input.data_dir.1", "nowhere: no such file"],
    ),
    "evaluated only": (
        "  data_dir: data/val\n",
        "  data_dir: long\n",
        ["--mode", "eval", "--checkpoint_path", "hf"],
        ["eval_input.data_dir: ", "sequences of 64 tokens"],
    ),
    "batch": (
        "  batch_size: 8  # global\n",
        "  batch_size: 9\n",
        ["--nproc", "2"],
        ["train_input.batch_size", "global batch size 9 is not a multiple of"],
    ),
    "heads": ("  num_heads: 4\n", "  num_heads: 1\n", ["--tp", "2"], ["1", "heads"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_to_change_is_named(
    repo_root: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    """One line, before ranks start (starting any fails the test); nothing is written. Planted: no preflight, fails."""
    from data_prep.errors import exit_on_bad_input
    from megatron.crystalcoder.training import launch, pretrain
    from tools import pretrain as command

    def no_ranks(*arguments: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "main", no_ranks)
    monkeypatch.setattr(pretrain, "main", no_ranks)
    monkeypatch.delenv(pretrain.CHECKED, raising=False)
    old, new, more, words = CASES[case]
    text = (repo_root / "params/tiny/phase1.yaml").read_text()
    assert old in text
    params = tmp_path / "p.yaml"
    params.write_text(text.replace(old, new, 1))
    overrides = [each for each in SMALL if not each.startswith("train_input.batch_size")]
    where = ["--params", str(params), "--data_root", str(data_root), "--model_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop, exit_on_bad_input():
        command.main([*where, *more, *overrides])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for word in words:
        assert word in told
    if case != "heads":  # --tp is the one to change
        line = int(told.split(":")[2])
        assert told.startswith(f"error: {params}:{line}: ")
        assert params.read_text().splitlines()[line - 1].strip() == new.strip().removeprefix("- ") or new.startswith(
            f"  {params.read_text().splitlines()[line - 1].strip()}"
        )
    assert not (tmp_path / "out").exists()


def test_rank_0_checks_where_no_launcher_has(repo_root: Path, data_root: Path, tmp_path: Path) -> None:
    """Started by torchrun, as on many nodes: exit code 2 and the line, before the process group is joined."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "megatron.crystalcoder.training.pretrain", "--params", "params/tiny/phase1.yaml",
         "--data_root", str(tmp_path), "--model_dir", str(tmp_path / "out"), *SMALL],
        cwd=repo_root, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if "arning" not in line and "warn(" not in line]
    assert len(errors) == 1
    assert "phase1.yaml:16: train_input.mixture.0.data_dir: " in errors[0]
    assert "data/prose: no such file or directory" in errors[0]
