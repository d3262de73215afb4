"""What a command costs: CPU seconds of all its processes, wall seconds, and the memory of its largest process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import InputError


class Cost(NamedTuple):
    """CPU seconds of the command and all it started, wall seconds, and megabytes of the largest process."""

    cpu: float
    wall: float
    peak: float


def cost(module: str, *arguments: str) -> Cost:
    """Run `python -m module arguments`, one thread a process.

    Raises:
        InputError: it failed.
    """
    return cost_of(sys.executable, "-m", module, *arguments)


def cost_of(*command: str) -> Cost:
    """Run a command.

    Raises:
        InputError: it failed.
    """
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **single}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # unlike getrusage, of this command alone
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{' '.join(command)}: failed ({process.returncode})")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def best_of(rounds: int, out: Path, measure: Callable[..., Cost], *command: str) -> Cost:
    """The cheapest of some runs of a command by `cost` or `cost_of`; the folder `out` is deleted before each."""
    costs = []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        costs.append(measure(*command))
    return min(costs)
