"""Run a script where this project is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_remote(script: str, *arguments: Path, cache: Path) -> None:
    """Run in a fresh process, outside the checkout, that cannot see this project's packages."""
    hide = "import os, sys; sys.path = [p for p in sys.path if not os.path.isdir(p + '/CrystalCoder')]\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", hide + script, *map(str, arguments)],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
