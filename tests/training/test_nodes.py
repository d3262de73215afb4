"""`crystalcoder pretrain --nodes`: the lines that start the job, printed after all checks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.training import nodes
from support.pretraining import SMALL, write_data
from support.training_runs import metrics_of
from tools import pretrain


def lines_for(repo_root: Path, out: Path, data_root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    params = str(repo_root / "params/tiny/phase1.yaml")
    pretrain.main(["--params", params, "--data_root", str(data_root), "--model_dir", str(out), *SMALL, *more])
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


def test_the_lines_are_printed_and_nothing_started(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes, ranks and arguments, taken apart by a shell as they were put together; the Slurm template is there."""
    write_data(tmp_path)
    out = tmp_path / "a run"
    slurm, launch = lines_for(repo_root, out, tmp_path, capsys, "--nodes", "4", "--tp", "2", "--nproc", "4")
    words = shlex.split(slurm)
    assert words[:6] == ["MAX_RESTARTS=3", "sbatch", "--nodes", "4", "--gpus-per-node", "4"]
    assert (repo_root / words[6]).is_file()
    assert words[words.index("--model_dir") + 1] == str(out)
    assert shlex.split(launch)[1:5] == ["-m", "megatron.crystalcoder.training.launch", "--nnodes", "4"]
    for line in (slurm, launch):
        assert shlex.split(line)[-len(SMALL) - 2 :] == [*SMALL, "--tp", "2"]
    assert not out.exists()
    for more, message in (
        (["--nodes", "3", "--nproc", "3", "--tp", "2"], "--nproc 3 on 3 nodes is not a multiple of --tp 2"),
        (["--nodes", "2"], "global batch size 8 is not a multiple of micro-batch size 1 x 16"),
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            lines_for(repo_root, tmp_path / "x", tmp_path, capsys, *more)


def test_what_says_how_many_ranks_is_not_passed_to_them() -> None:
    """torchrun ends with "ambiguous option: --nproc". Planted: only `--nproc N` taken out, fails."""
    given = ["--nproc", "2", "--params", "p", "--nodes=3", "--tp", "2", "--max-restarts=4", "a.b=--nproc"]
    assert nodes.for_ranks(given) == ["--params", "p", "--tp", "2", "a.b=--nproc"]


@pytest.mark.slow
def test_the_printed_line_runs(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of one rank on this machine, TP2, are one job."""
    write_data(tmp_path)
    arguments = ("--nodes", "2", "--nproc", "1", "--tp", "2", "--max-restarts", "0")
    _, line = lines_for(repo_root, tmp_path / "run", tmp_path, capsys, *arguments)
    line = line.replace("HOST", "localhost").replace("29500", "29517")
    _, *words = shlex.split(line)
    started = [
        subprocess.Popen(
            [sys.executable, *(str(node) if word == "NODE_RANK" else word for word in words)],
            cwd=repo_root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    told = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert len(metrics_of(tmp_path / "run")) == 6
