"""The `crystalcoder` command's door."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import exit_on_bad_input

ROWS = "fixtures/data/out/tok/star_2048_p1/examples_0_0.h5"


@pytest.mark.parametrize(
    "command",
    [
        "tools.cli --help",
        "tools.cli data --help",  # printed by rich, which has its own way
        f"tools.cli data inspect {ROWS}",
        f"tools.cli data verify {ROWS}",  # one line, that waits in the buffer until the end
        f"tools.cli data verify {ROWS} --vocab-size 9",
        "data_prep.parquet2jsonl --help",
    ],
)
def test_output_that_nobody_reads(command: str, repo_root: Path, shared: Path) -> None:
    """As in `crystalcoder … | head -3`: quiet, and the exit code of SIGPIPE.

    Planted: BrokenPipeError not caught -> a traceback; the buffer left to Python's end -> "Exception ignored in" and
    120; no copy of stdout -> 1 where rich or click saw it: fail.
    """
    read, write = os.pipe()
    os.close(read)
    arguments = [str(shared / word) if word == ROWS else word for word in command.split()]
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=repo_root, stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_place_that_may_not_be_touched(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, however deep down it was met; what is no matter of permissions keeps its traceback.

    Planted: only InputError told -> a traceback, fails.
    """
    with pytest.raises(SystemExit) as stop, exit_on_bad_input():
        raise PermissionError(errno.EACCES, "Permission denied", "/data/x/manifest.json")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: /data/x/manifest.json: Permission denied: ")
    with pytest.raises(FileNotFoundError), exit_on_bad_input():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")
