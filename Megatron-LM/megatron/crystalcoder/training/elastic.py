"""torchrun's agent, one a node, that restarts a training job from its last checkpoint when a rank or a node dies.

torchrun starts this node's ranks again when one of them fails (`--max-restarts` times). Added here:

- A rank that ended for a reason that would come again (bad input, divergence) or by request (SIGTERM) ends the job.
- The nodes count attempts in their common store. Each looks there every second, and starts its ranks anew when another
  node has begun the next attempt: a rank that waits for dead peers may not notice for many minutes. A launcher started
  again on a node that died joins the attempt that the others are waiting in.
- The ranks of an attempt meet under its number: in the store, those of earlier ones left addresses that lead nowhere.
- What is left of a broken group is killed at once: without its peers it can neither finish its step nor save. So are
  the helpers of a rank that was killed: they would live on, and keep the pipes open that others read to their end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from data_prep.errors import EXIT_BAD_INPUT
from megatron.crystalcoder.platform import ATTEMPT
from megatron.crystalcoder.training.exit_codes import EXIT_DIVERGED, EXIT_INTERRUPTED

FINAL = (EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED)
_KEY = "crystalcoder/attempt"
_OVER = "over"


class JobIsOver(RuntimeError):
    """Another node ended the job for good."""


class Agent(LocalElasticAgent):
    """Put in place of torchrun's own by `launch`."""

    _attempt = 0
    _looked = 0.0
    _sessions: tuple[int, ...] = ()  # a rank leads one, named by its pid

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        try:
            super()._rendezvous(worker_group)
        except dist.DistError:
            # The store went with node 0's launcher: wait for a new one.
            worker_group.spec.rdzv_handler._store = None  # type: ignore[attr-defined]
            self._attempt = 0
            super()._rendezvous(worker_group)
        self._attempt = next_attempt(worker_group.store, self._attempt)
        os.environ[ATTEMPT] = str(self._attempt)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        self._sessions = tuple(pids.values())
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            for pid in self._sessions:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            if any(failure.exitcode in FINAL for failure in result.failures.values()):
                self._remaining_restarts = 0
            if self._remaining_restarts == 0:
                _end_job(worker_group.store)
            else:
                self._tell(how_it_ended(result.failures))
        elif result.state == WorkerState.HEALTHY and self._remaining_restarts and self._others_went_on(worker_group):
            self._tell("another node starts its ranks again")
            return RunResult(state=WorkerState.UNHEALTHY)
        return result

    def _others_went_on(self, worker_group: WorkerGroup) -> bool:
        store: Any = worker_group.store
        if worker_group.group_world_size == 1 or time.monotonic() < self._looked + 1:
            return False
        self._looked = time.monotonic()
        try:
            current = store.get(_KEY).decode()
        except dist.DistError:
            return False  # the ranks will notice
        return current == _OVER or int(current) > self._attempt

    def _tell(self, what: str) -> None:
        number = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
        print(
            f"{what}: going on from the last checkpoint (restart {number} of {self._worker_group.spec.max_restarts})",
            file=sys.stderr,
            flush=True,
        )

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)
        super()._restart_workers(worker_group)


def next_attempt(store: Any, last: int) -> int:
    """The number of the attempt to join: the one that another node has begun since `last`, else a new one.

    Raises:
        JobIsOver: another node has ended the job.
    """
    new = str(last + 1)
    current = store.compare_set(_KEY, "", new).decode()  # sets it where there is none
    if current == str(last):
        current = store.compare_set(_KEY, current, new).decode()
    if current == _OVER:
        raise JobIsOver
    return int(current)


def _end_job(store: Any) -> None:
    try:
        store.set(_KEY, _OVER)
    except dist.DistError:
        return  # nobody is there to be told


def how_it_ended(failures: dict[int, Any]) -> str:
    """The first failure in words. failures: by rank, with `exitcode` and `timestamp`."""
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    how = f"exit code {first.exitcode}" if first.exitcode >= 0 else f"signal {-first.exitcode}"
    return f"rank {rank} ended with {how}"
