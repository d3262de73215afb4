"""A torch profiler's trace of some steps: what ran when on this rank, CPU and GPU, for chrome://tracing or Perfetto."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.training.config import ProfileSettings, TrainConfig


@dataclass
class _Running:
    profiler: profile
    first: int
    last: int


class StepProfiler:
    """A context manager around the loop. A trace is written when its last step is done or the loop ends before."""

    def __init__(self, config: TrainConfig, *, done: int) -> None:
        """`done`: iterations done so far. Raises InputError when no step that is still to come would be traced."""
        self._settings = config.profile
        self._running: _Running | None = None
        if config.profile is None:
            return
        check_profile(config.profile, config.train_iters, dist.get_world_size())
        if done >= config.profile.last and dist.get_rank() == 0:
            print(f"no profile: the run goes on behind step {config.profile.last}", flush=True)

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Around the step that makes `iteration` iterations done."""
        settings = self._settings
        if settings is None or not (settings.first <= iteration <= settings.last and self._is_chosen(settings)):
            yield
            return
        if self._running is None:
            self._running = _Running(_started(), iteration, iteration)
        with record_function(f"iteration {iteration}"):
            yield
        self._running.last = iteration
        if iteration == settings.last:
            self._write()

    def _is_chosen(self, settings: ProfileSettings) -> bool:
        return settings.ranks is None or dist.get_rank() in settings.ranks

    def _write(self) -> None:
        assert self._running is not None
        assert self._settings is not None
        running, self._running = self._running, None
        if platform.is_cuda():
            torch.cuda.synchronize()  # what the last step has launched belongs to it
        running.profiler.stop()
        folder = self._settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"steps_{running.first}-{running.last}_rank_{dist.get_rank()}.json.gz"
        partial = file.with_name(f".partial_{file.name}")
        running.profiler.export_chrome_trace(str(partial))
        os.replace(partial, file)
        print(f"profile of steps {running.first} to {running.last}: {file}", flush=True)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._write()


def _started() -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if platform.is_cuda() else [])]
    profiler = profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler


def check_profile(settings: ProfileSettings, train_iters: int, world_size: int) -> None:
    """Raise InputError for steps or ranks that this run does not have."""
    if settings.first > train_iters:
        raise InputError(
            f"--profile: step {settings.first} is behind the run's last step, {train_iters}: choose another"
        )
    missing = [rank for rank in sorted(settings.ranks or ()) if rank >= world_size]
    if missing:
        raise InputError(f"--profile-ranks: there is no rank {missing[0]} among {world_size}: choose others")
