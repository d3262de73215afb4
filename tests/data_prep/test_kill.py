"""Kill -9 at random moments, relaunch: the same bytes as an undisturbed run, no row lost or doubled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.verification import verify
from support.tiny_tokenizer import TEXT

KILLS = 50


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["tokenize", "fim", "shuffle", "parquet2jsonl"])
def test_killed_at_random_moments(step: str, tmp_path: Path, tokenizer_file: Path, repo_root: Path) -> None:
    """50 kills per step, of a command with workers of its own. What each change of the disk guards is proved without
    chance by test_relaunch_completes_the_same_bytes and test_killed.py."""
    import pyarrow
    import pyarrow.parquet

    generator = np.random.default_rng(0)
    words = TEXT.split(" ")
    (tmp_path / "in").mkdir()
    for number in range(12):
        texts = [" ".join(generator.choice(words, 2000)) for _ in range(20)]
        pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / f"in/{number:02d}.parquet")
    command = [sys.executable, "-m", "tools.cli", "data"]

    def run(arguments: list[str]) -> None:
        done = subprocess.run([*command, *arguments], cwd=repo_root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    tokenize = ["tokenize", str(tmp_path / "in"), "--tokenizer", str(tokenizer_file), "--max-seq-length", "256",
                "--shard-mb", "0", "--processes", "2", "--fim-rate", "0.5"]  # fmt: skip
    plain = tmp_path / "plain"
    if step in ("fim", "shuffle"):
        run([*tokenize[:-2], "--out", str(plain)])
    arguments = {
        "tokenize": tokenize,
        "fim": ["fim", str(plain), "--tokenizer", str(tokenizer_file), "--rate", "0.9", "--epochs", "2",
                "--processes", "2"],
        "shuffle": ["shuffle", str(plain), "--files", "9", "--seed", "3", "--processes", "2"],
        "parquet2jsonl": ["parquet2jsonl", str(tmp_path / "in")],
    }[step]  # fmt: skip
    started = time.monotonic()
    run([*arguments, "--out", str(tmp_path / "undisturbed")])
    duration = time.monotonic() - started
    torn, kills, attempt = tmp_path / "torn", 0, 0
    while kills < KILLS:
        attempt += 1
        started = time.monotonic()
        process = subprocess.Popen([*command, *arguments, "--out", str(torn)], cwd=repo_root, stderr=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(0.2, 0.9) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # done before it could be killed: check, start over, and kill earlier
            assert contents(torn) == contents(tmp_path / "undisturbed")
            duration = min(duration, time.monotonic() - started)
            torn = tmp_path / f"torn_{attempt}"
    run([*arguments, "--out", str(torn)])
    assert contents(torn) == contents(tmp_path / "undisturbed")
    assert json.loads((torn / "manifest.json").read_text())["outputs"]
    if step != "parquet2jsonl":
        assert verify(torn) == []
