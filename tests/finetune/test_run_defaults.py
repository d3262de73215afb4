"""Where nobody says otherwise, `finetune run` and rank_cmd_phase2.sh take the reference's hyper-parameters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import InputError
from tools import finetune

REFERENCE = {
    "--train-iters": 1600,
    "--global-batch-size": 1024,
    "--seq-length": 2048,
    "--lr": 2e-4,
    "--min-lr": 2e-5,
    "--lr-warmup-fraction": 0.001,
    "--weight-decay": 0.1,
    "--clip-grad": 1.0,
    "--adam-beta1": 0.9,
    "--adam-beta2": 0.95,
    "--adam-eps": 1e-8,
    "--save-interval": 100,
    "--seed": 42,
}


def values(arguments: list[str]) -> dict[str, str]:
    """Flag -> what follows it."""
    return {flag: value for flag, value in zip(arguments, [*arguments[1:], ""], strict=True) if flag.startswith("--")}


def check(arguments: list[str]) -> None:
    found = values(arguments)
    assert {flag: float(found[flag]) for flag in REFERENCE} == pytest.approx(REFERENCE)
    assert found["--lr-decay-style"] == "cosine"
    assert "--sequence-parallel" in found
    assert "--use-checkpoint-args" in found
    assert found["--max-restarts"] == "3"


def test_the_script(repo_root: Path, tmp_path: Path) -> None:
    shutil.copyfile(repo_root / "rank_cmd_phase2.sh", tmp_path / "rank_cmd_phase2.sh")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    names = ("ITERS", "GLOBAL_BATCH_SIZE", "SEQ_LENGTH", "EXTRA_ARGS", "MAX_RESTARTS")
    done = subprocess.run(
        ["bash", str(tmp_path / "rank_cmd_phase2.sh"), "0", "1", "localhost", "29500", "2", "4", "1", str(tmp_path)],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = json.loads(done.stdout)
    check(arguments)
    assert values(arguments)["--dataloader-type"] == "cyclic"
    assert values(arguments)["--lr-decay-iters"] == "1600"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out part is evaluated and its best checkpoint kept, without a word about it."""
    facts: dict[str, Any] = {"settings": {"max_seq_length": 2048, "packing": "best-fit"}, "valid": {}}
    (tmp_path / "prepare.json").write_text(json.dumps(facts))
    started: list[list[str]] = []
    monkeypatch.setattr(
        finetune.subprocess, "run", lambda command, **how: started.append(command) or SimpleNamespace(returncode=0)
    )
    with pytest.raises(SystemExit):
        finetune.main(["run", str(tmp_path), "--load", "MODEL", "--save", str(tmp_path / "run")])
    (arguments,) = started
    check(arguments)
    found = values(arguments)
    assert found["--valid-data-path"] == str(tmp_path / "valid")
    assert found["--eval-interval"] == "50"
    assert {"--keep-best", "--isolate-documents"} <= found.keys()


def test_patience_without_evaluations(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"settings": {"max_seq_length": 2048, "packing": "best-fit"}, "valid": {}}
    (tmp_path / "prepare.json").write_text(json.dumps(facts))
    how = ["--load", "MODEL", "--save", str(tmp_path / "run"), "--patience", "2", "--eval-interval", "0"]
    with pytest.raises(InputError, match="--patience counts evaluations, and --eval-interval 0 makes none"):
        finetune.main(["run", str(tmp_path), *how])


@pytest.mark.parametrize(
    ("rank", "count", "tp", "message"),
    [
        ("2", "2", "1", "NODE_RANK 2 of 2 nodes: number them from 0 to 1"),  # it would wait half an hour
        ("0", "0", "1", "NODE_CNT, TP, PP and MBSZ must be at least 1"),
        ("0", "1", "00", "NODE_CNT, TP, PP and MBSZ must be at least 1"),
        ("0", "1", "two", "'two' is not a number"),
    ],
)
def test_the_script_refuses_numbers_that_make_no_job(
    repo_root: Path, tmp_path: Path, rank: str, count: str, tp: str, message: str
) -> None:
    done = subprocess.run(
        ["bash", repo_root / "rank_cmd_phase2.sh", rank, count, "localhost", "29500", tp, "1", "1", tmp_path / "logs"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not (tmp_path / "logs").exists()
