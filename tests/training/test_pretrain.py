"""Pretraining end to end: the same losses at every layout, phase after phase, and from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.distributed import run_on_ranks
from support.dying_rank import write_dying_rank
from support.pretraining import SMALL, write_data
from support.training_runs import column


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("pretrain"))


def pretrain(params: Path, runs: list[list[str]]) -> list[list[float]]:
    """On this rank: one run after the other in one process; the losses of each, from its metrics.jsonl."""
    from megatron.crystalcoder.checkpoint.random_init import RandomWeights
    from megatron.crystalcoder.training.loop import train
    from megatron.crystalcoder.training.pretrain import parse, train_config

    losses = []
    for arguments in runs:
        options, [phase] = parse(["--params", str(params), *SMALL, *arguments])
        values, config = phase.params, train_config(options, phase, int(os.environ["WORLD_SIZE"]))
        train(config, initial_weights=RandomWeights(config.model, values.init_settings(), values.init_seed))
        assert config.save is not None
        losses.append(
            [json.loads(line)["lm_loss"] for line in (config.save / "metrics.jsonl").read_text().splitlines()]
        )
    return losses


def test_losses_do_not_depend_on_the_layout(repo_root: Path, data_root: Path) -> None:
    """Six steps from random weights on a mixture: one rank; TP2 + sequence parallelism; two data-parallel ranks with
    the distributed optimizer and other micro-batches; then two steps more, resumed at another layout.

    Planted: initial weights seeded by rank (TP2 differs by 2.2); ranks that read overlapping rows (DP2 differs by 1.1);
    sequences of a micro-batch not divided by (other micro-batches differ by 160): each fails.
    """
    common = ["--data_root", str(data_root), "--model_dir"]
    params = repo_root / "params/tiny/phase1.yaml"
    [[alone, small]] = run_on_ranks(
        1,
        pretrain,
        params,
        [[*common, str(data_root / "a")], [*common, str(data_root / "b"), "--micro-batch-size", "2"]],
    )
    [two, _] = run_on_ranks(
        2,
        pretrain,
        params,
        [
            [*common, str(data_root / "c"), "--tp", "2", "--sequence-parallel"],
            [*common, str(data_root / "d"), "--micro-batch-size", "2", "--use-distributed-optimizer"],
            [*common, str(data_root / "a"), "--tp", "2", "runconfig.max_steps=8"],
        ],
    )
    assert len(alone) == 6
    assert alone[5] < alone[0] - 0.5  # it learns
    for other in (small, *two[:2]):
        assert np.abs(np.subtract(other, alone)).max() < 1e-4
    assert two[2][:6] == alone  # the resumed run goes on, it does not begin anew
    assert len(two[2]) == 8


def run_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "pretrain", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_command_trains_phases_and_evaluates(repo_root: Path, data_root: Path) -> None:
    """Phase 1 on two ranks through the launcher, phase 2 from its checkpoint at step 0, then an evaluation of it.

    Planted: finetune=False in the configuration: phase 2 takes phase 1's place in its data for its own, fails.
    """
    small = ["--data_root", str(data_root), *SMALL, "runconfig.max_steps=3"]
    first = run_command(
        "--params",
        "params/tiny/phase1.yaml",
        "--model_dir",
        str(data_root / "p1"),
        "--tp",
        "2",
        "--nproc",
        "2",
        *small,
        cwd=repo_root,
    )
    assert first.returncode == 0, first.stderr
    assert "accepted, but without effect outside CS-2: train_input.repeat" in first.stdout
    assert "prose: 87.50% of the samples, 24 rows seen" in first.stdout
    second = run_command(
        "--params", "params/tiny/phase2.yaml", "--model_dir", str(data_root / "p2"), "--mode", "train_and_eval",
        "--checkpoint_path", str(data_root / "p1"), *small, "optimizer.learning_rate=0.0", cwd=repo_root,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert len((data_root / "p2/metrics.jsonl").read_text().splitlines()) == 3
    evaluated = json.loads((data_root / "p2/eval.jsonl").read_text().splitlines()[-1])
    third = run_command(
        "--params", "params/tiny/phase2.yaml", "--mode", "eval", "--checkpoint_path", str(data_root / "p1"), *small,
        cwd=repo_root,
    )  # fmt: skip
    assert third.returncode == 0, third.stderr
    result = json.loads(third.stdout.splitlines()[-1])
    assert result["lm_loss"]["val"] == result["mean"]
    # Phase 2 ran at learning rate 0: its weights are phase 1's.
    assert result["mean"] == pytest.approx(evaluated["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_a_rank_that_dies_is_replaced(repo_root: Path, data_root: Path, tmp_path: Path) -> None:
    """One of two data-parallel ranks is killed at step 5 of 6: the losses are those of a run in which none was."""
    dying = write_dying_rank(tmp_path / "dying", rank=1, step=5)
    for name, environment in (("whole", {}), ("again", {"PYTHONPATH": str(dying)})):
        done = run_command(
            "--params", "params/tiny/phase1.yaml", "--model_dir", str(tmp_path / name), "--nproc", "2",
            "--data_root", str(data_root), *SMALL, cwd=repo_root, **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (dying / "died").exists()
    assert "rank 1 ended with signal 9: going on from the last checkpoint (restart 1 of 3)" in done.stderr
    assert "starting from iteration 3 of" in done.stdout
    np.testing.assert_array_equal(column(tmp_path / "again", "lm_loss"), column(tmp_path / "whole", "lm_loss"))


def test_bad_input_is_one_line_and_exit_code_2(repo_root: Path, data_root: Path, tmp_path: Path) -> None:
    """A wrong key before any rank starts; missing data and a wrong layout; nothing is written."""
    target = tmp_path / "out"
    start = ["--params", "params/tiny/phase1.yaml", "--model_dir", str(target)]
    for arguments, message in (
        (["runconfig.max_step=1"], "did you mean runconfig.max_steps?"),
        (["--data_root", str(tmp_path)], f"{tmp_path}/data/prose: no such file or directory"),
        (["--nproc", "3", "--tp", "2"], "--nproc 3 is not a multiple of --tp 2 x --pp 1"),
    ):
        ended = run_command(*start, *arguments, cwd=repo_root)
        assert ended.returncode == 2, ended.stderr
        lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in ended.stderr
        assert not target.exists()
