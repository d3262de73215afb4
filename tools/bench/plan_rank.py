"""One rank of one measured run of `make bench BENCH=plan`: its memory and the CPU seconds of its steps, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.initialization import InitSettings
from megatron.crystalcoder.training.config import DataSettings, TrainConfig, WarmupDecay
from megatron.crystalcoder.training.loop import build
from megatron.crystalcoder.training.resume import Start
from megatron.crystalcoder.training.step import train_step

STEPS = 3
LOSS_CHUNK = 512


def main(job: dict[str, Any], out: Path) -> None:
    """Train `STEPS` steps of the job's model on random rows; the first step is not timed."""
    platform.initialize()
    model = ModelConfig(**job["model"])
    layout = job["layout"]
    parallel = ParallelConfig(
        layout["tp"],
        layout["pp"],
        sequence_parallel=layout["sequence_parallel"],
        use_distributed_optimizer=layout["distributed_optimizer"],
        recompute=layout["recompute"],
    )
    config = TrainConfig(
        model=model,
        data=DataSettings(),
        schedule=WarmupDecay(1e-4, 1e-4, 0, 1, "constant"),
        train_iters=STEPS,
        micro_batch_size=layout["micro_batch"],
        global_batch_size=job["global_batch"],
        seq_length=job["seq_length"],
        parallel=parallel,
        speed=Speed(loss_chunk=LOSS_CHUNK),
    )
    platform.initialize_model_parallel(parallel, 1)
    # What imports and a first model of this kind allocate for good is not the model's: a small one goes before.
    small = replace(model, num_layers=layout["pp"], vocab_size=512)
    _run(replace(config, model=small), steps=1)
    before = _resident()
    seconds = _run(config, steps=STEPS)
    result = {"bytes": _peak() - before, "cpu_seconds": min(seconds[1:])}
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


def _run(config: TrainConfig, steps: int) -> list[float]:
    weights = RandomWeights(config.model, InitSettings.for_hf(config.model), seed=1)
    model, optimizer = build(config, Start("new weights", weights))
    size = (config.micro_batch_size, config.seq_length)
    tokens = torch.randint(0, config.model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "position_ids": torch.arange(size[1]).repeat(size[0], 1),
        "loss_mask": torch.ones(size),
    }
    _forget_peak()
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        train_step(model, optimizer, cycle([batch]), config, lr=1e-4)
        seconds.append(time.process_time() - start)
    return seconds


def _status(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
