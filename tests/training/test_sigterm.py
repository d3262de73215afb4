"""A launcher's SIGTERM reaches a rank's helper processes too; it must find them alive when it saves.

test_launch.py sends one to a run that has not saved before; here the helpers of an earlier checkpoint are there.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.training.config import DataSettings
from support.distributed import run_on_ranks
from support.sequence_rows import S, V, make_rows, write_h5
from support.training_runs import metrics_of, tiny_config, tiny_weights, write_rows


def helpers() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def save_twice_with_a_sigterm_between(rows: Path, save: Path) -> int:
    """The group of this rank, which leads none here, is the processes below it and itself."""
    from megatron.crystalcoder.training.loop import train

    found = 0

    def on_checkpoint(progress: Any, account: Any) -> None:
        nonlocal found
        if progress.iteration == 1:
            found = len(helpers())
            for helper in helpers():
                helper.send_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    data = replace(tiny_config(rows).data, num_workers=1)
    config = tiny_config(rows, save, train_iters=50, save_interval=1, data=data)
    result = train(config, initial_weights=cast(Any, tiny_weights()), on_checkpoint=on_checkpoint)
    assert result.interrupted
    return found


def test_a_run_that_has_saved_before_saves(tmp_path: Path) -> None:
    """Its helpers are forked from a server here, which gets the signal as well: without it, they would end.

    Planted: `helpers_outlive_sigterm` left out in run_state.py, in loader.py: BrokenPipeError, a dead worker: fail.
    """
    write_rows(tmp_path / "rows.jsonl")
    [found] = run_on_ranks(1, save_twice_with_a_sigterm_between, tmp_path / "rows.jsonl", tmp_path / "run")
    assert found >= 2  # one reads rows, one collects what writers report
    stopped = int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text())
    assert 2 <= stopped == len(metrics_of(tmp_path / "run")) < 50


FIRST_HELPER = """
import multiprocessing, os, signal
from megatron.crystalcoder.sigterm import helpers_outlive_sigterm
if __name__ == "__main__":
    with helpers_outlive_sigterm():
        manager = multiprocessing.get_context("spawn").Manager()
        queue = manager.Queue()
    os.kill(manager._process.pid, signal.SIGTERM)
    manager._process.join(2)
    queue.put("alive")
    print(queue.get())
"""


def test_the_first_helper_of_a_process_lives_too(tmp_path: Path) -> None:
    """A process that has started none before, as a rank that saves for the first time. Planted: no `ensure_running`."""
    (tmp_path / "first.py").write_text(FIRST_HELPER)
    done = subprocess.run([sys.executable, tmp_path / "first.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n", done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_workers_read_on(tmp_path: Path, number: int) -> None:
    write_h5(tmp_path / "rows.h5", make_rows(20))
    settings = DataSettings(paths=(tmp_path / "rows.h5",), order="single")
    rows, order = open_data(settings, seq_length=S, vocab_size=V)
    batches = micro_batches(
        rows, order, consumed_samples=0, micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=number
    )
    others = set(multiprocessing.active_children())  # a manager of a test before, in the same process
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == number
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
    assert sum(len(batch["tokens"]) for batch in itertools.islice(batches, 30)) == 60
