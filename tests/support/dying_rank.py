"""A rank that kills itself: for tests of what a job does when that happens."""

from __future__ import annotations

from pathlib import Path

SITECUSTOMIZE = '''
"""Python runs this at its start: one rank sends itself a signal as it begins a certain training step, once."""
import importlib.util
import os
import pathlib
import sys

RANK, STEP, SIGNAL = {rank}, {step}, {signal}
DIED = pathlib.Path({died!r})
MODULE = "megatron.crystalcoder.training.step"


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            start_step, steps = module.start_step, []

            def dying(*args, **kwargs):
                steps.append(0)
                if len(steps) == STEP and not DIED.exists():
                    DIED.touch()
                    os.kill(os.getpid(), SIGNAL)
                return start_step(*args, **kwargs)

            module.start_step = dying

        spec.loader.exec_module = execute_and_wrap
        return spec


if os.environ.get("RANK") == str(RANK):
    sys.meta_path.insert(0, Finder())
'''


def write_dying_rank(folder: Path, *, rank: int, step: int, signal: int = 9) -> Path:
    """Make `folder`, to be put on PYTHONPATH. There `died` appears when `rank` gets `signal` as its `step` begins."""
    folder.mkdir()
    source = SITECUSTOMIZE.format(rank=rank, step=step, signal=int(signal), died=str(folder / "died"))
    (folder / "sitecustomize.py").write_text(source)
    return folder
