"""`crystalcoder quickstart`: the commands of every stage in miniature; the full one among the slow tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tools.quickstart_report import read_metrics


def quickstart(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, from the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", "quickstart", "--dir", str(directory), *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"COLUMNS": "300", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def losses(directory: Path) -> list[float]:
    return [record["lm_loss"] for record in read_metrics(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of a few steps of everything, and what it printed."""
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    done = quickstart(directory, "--scale", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def test_the_chain_runs_from_text_to_an_answer(miniature: tuple[Path, str]) -> None:
    run, printed = miniature
    for command in (
        "crystalcoder data parquet2jsonl ",
        "crystalcoder data tokenize ",
        "crystalcoder data fim ",
        "crystalcoder data shuffle ",
        "crystalcoder pretrain --params params/tiny/phase3.yaml ",
        "python Megatron-LM/tools/checkpoint/util.py --model-type GPT --loader crystalcoder_hf --saver megatron ",
        "bash rank_cmd_phase2.sh 0 1 localhost ",
        "python Megatron-LM/tools/checkpoint/util.py --model-type GPT --loader megatron --saver crystalcoder_hf ",
        "crystalcoder generate ",
        "crystalcoder chat ",
    ):
        assert f"$ {command}" in printed or f" {command}" in printed
    for stage in ("phase1", "phase2", "phase3", "tuned"):
        assert all(0 < loss < 50 for loss in losses(run / stage))
    # A phase goes on where the one before stopped: nothing like a new model's loss.
    assert losses(run / "phase2")[0] < 0.7 * losses(run / "phase1")[0]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "instruction tuning" in printed
    assert "loss before" in printed

    # The four ranks' training changed the model, and what came back is a whole one.
    with (
        safe_open(run / "hf/model.safetensors", "pt") as before,
        safe_open(run / "hf_chat/model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        assert all(before.get_tensor(name).shape == after.get_tensor(name).shape for name in before.keys())  # noqa: SIM118
        assert not before.get_tensor("transformer.wte.weight").equal(after.get_tensor("transformer.wte.weight"))


def test_a_second_run_skips_every_stage(miniature: tuple[Path, str]) -> None:
    run, _ = miniature
    stamps = {path.name: path.read_text() for path in (run / "stamps").glob("*.json")}
    again = quickstart(run, "--scale", "tiny")
    assert again.returncode == 0
    assert again.stdout.count("skipped") == len(stamps)
    assert "$ crystalcoder data" not in again.stdout
    assert {path.name: path.read_text() for path in (run / "stamps").glob("*.json")} == stamps


def test_fresh_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused = quickstart(tmp_path, "--fresh")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path}: is not an earlier quickstart's directory")
    assert (tmp_path / "thesis.tex").exists()

    from tools.quickstart import _start_over

    run = tmp_path / "run"
    (run / "stamps").mkdir(parents=True)
    (run / "old").touch()
    _start_over(run)
    assert not run.exists()
    _start_over(run)


@pytest.mark.slow
def test_the_full_quickstart_learns(tmp_path: Path) -> None:
    """Every loss falls, and the tuned model ends its answers."""
    done = quickstart(tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    first = losses(tmp_path / "run/phase1")
    assert sum(first[-10:]) / 10 < 6
    for stage in ("phase2", "phase3", "tuned"):
        values = losses(tmp_path / "run" / stage)
        assert sum(values[-10:]) < sum(values[:10])
    stamp = json.loads((tmp_path / "run/stamps/answers.json").read_text())
    assert stamp["seconds"] > 0
