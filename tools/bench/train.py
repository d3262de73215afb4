"""A training step in four ways on this CPU, in turn: same model, weights, rows, precision, threads (see train_ways.py).

Every way lives in a process of its own (tensor parallelism in two), which waits while another one takes its step. So a
busy minute of the machine hits all alike, and no way profits from what another has left in torch's thread pools.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.sequences import SequenceWriter
from tools.bench import train_ways
from tools.bench.report import Table
from tools.bench.train_ways import GLOBAL_BATCH, MICRO_BATCH, MODEL, SEQUENCE

THREADS, ROUNDS = 2, 5
# name -> (function of train_ways, ranks)
WAYS = {
    "plain PyTorch": ("plain_pytorch", 1),
    "transformers.Trainer": ("transformers_trainer", 1),
    "this trainer": ("this_trainer", 1),
    "this trainer, --compile ops": ("compiled", 1),
    "this trainer, --fusions none": ("unfused", 1),
    "this trainer, TP 2": ("this_trainer", 2),
}
# How far the losses of the same step, about 10, may be apart. In bf16 the ways round in different places: autocast
# leaves the sum of the layers in fp32.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}


@dataclass
class _Way:
    """The processes of one way, and what came of its steps."""

    name: str
    ends: list[Connection]
    processes: list[Any]
    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]

    def step(self, *, measured: bool) -> None:
        """Have it take a step, and wait for all ranks."""
        start = time.perf_counter()
        for end in self.ends:
            end.send("step")
        try:
            told = [end.recv() for end in self.ends]
        except EOFError:
            raise InputError(f"{self.name}: its process ended; is there memory for {len(WAYS)} models?") from None
        if isinstance(told[0], str):
            raise InputError(f"{self.name}: {told[0].strip().splitlines()[-1]}")
        if measured:
            self.seconds.append(time.perf_counter() - start)
            self.cpu_seconds.append(sum(cpu for _, cpu in told))
        self.losses.append(told[0][0])


def measure() -> Table:
    """Median seconds of a step in each way, the ratio to the plain loop in the same round, and the losses."""
    train_ways.require_accelerate()
    precisions = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    rows: list[tuple[str, ...]] = []
    for precision in precisions:
        rows += _measure(precision)
    return Table(
        "train",
        "Training step",
        f"{MODEL.num_parameters / 1e6:.0f}M parameters, sequence {SEQUENCE}, global batch {GLOBAL_BATCH} in "
        f"micro-batches of {MICRO_BATCH}, {THREADS} threads in all. Median of {ROUNDS} steps, taken in turn; ratios "
        "are medians over rounds. CPU seconds are those of all threads and ranks: on a busy machine they tell more."
        " bf16 is autocast on the Hugging Face model, here bf16 weights with fp32 copies. Each step's losses agree to "
        + " and ".join(f"{TOLERANCE[precision]:g} in {precision}" for precision in precisions)
        + ".",
        (
            "precision",
            "way",
            "s / step",
            "tokens / s",
            "ratio to plain",
            "CPU s / step",
            "ratio to plain",
            "loss at the last step",
        ),
        rows,
        command="make bench-train",
    )


def _measure(precision: str) -> list[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        ways = [_start(name, *way, Path(folder), precision) for name, way in WAYS.items()]
        try:
            for measured in (False, False, *[True] * ROUNDS):
                for way in ways:
                    way.step(measured=measured)
        finally:
            for process in (process for way in ways for process in way.processes):
                process.terminate()
                process.join()
    plain = ways[0]
    for way in ways:
        apart = max(abs(mine - theirs) for mine, theirs in zip(way.losses, plain.losses, strict=True))
        if apart > TOLERANCE[precision]:
            raise InputError(
                f"{way.name}, {precision}: the losses are {apart:.1e} from the plain loop's: not the same run"
            )
    rows: list[tuple[str, ...]] = []
    for way in ways:
        tokens = GLOBAL_BATCH * SEQUENCE / median(way.seconds)
        told = _with_ratio(way.seconds, plain.seconds), _with_ratio(way.cpu_seconds, plain.cpu_seconds)
        (wall, slower), (cpu, dearer) = told
        rows.append((precision, way.name, wall, f"{tokens:,.0f}", slower, cpu, dearer, f"{way.losses[-1]:.5f}"))
    return rows


def _with_ratio(seconds: list[float], plain: list[float]) -> tuple[str, str]:
    ratio = median(mine / theirs for mine, theirs in zip(seconds, plain, strict=True))
    return f"{median(seconds):.3f}", f"{ratio:.2f}"


def _start(name: str, function: str, ranks: int, folder: Path, precision: str) -> _Way:
    rows = folder / "rows.h5"
    if not rows.exists():
        _write_rows(rows)
    context = multiprocessing.get_context("spawn")
    way = _Way(name, [], [], [], [], [])
    for rank in range(ranks):
        here, there = context.Pipe()
        environment = {"OMP_NUM_THREADS": str(THREADS // ranks)}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        before = dict(os.environ)
        os.environ.update(environment)  # a spawned process has it before it imports torch
        process = context.Process(
            target=_serve, args=(function, rows, precision == "bf16", there, str(folder / f"{function}_{ranks}"))
        )
        process.start()
        os.environ.clear()
        os.environ.update(before)
        way.ends.append(here)
        way.processes.append(process)
    return way


def _serve(function: str, rows: Path, bf16: bool, end: Connection, rendezvous: str) -> None:
    """In a process: take a step for each message, and tell its loss or what went wrong."""
    if "WORLD_SIZE" in os.environ:
        from megatron.crystalcoder import platform

        platform.initialize(init_method=f"file://{rendezvous}")

    used = 0.0

    def done(loss: float) -> None:
        nonlocal used
        end.send((loss, time.process_time() - used))
        end.recv()
        used = time.process_time()

    try:
        end.recv()
        getattr(train_ways, function)(train_ways.config(rows, bf16=bf16), done)
    except Exception:  # noqa: BLE001 - told to the one who waits
        end.send(traceback.format_exc())


def _write_rows(path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, MODEL.vocab_size, (64, SEQUENCE + 1), dtype=np.int32)
    with SequenceWriter(path, SEQUENCE) as writer:
        writer.write(np.stack([ids[:, :-1], np.ones_like(ids[:, 1:]), ids[:, 1:]], axis=1))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AVX-512 BF16 or AMX); elsewhere torch would only imitate it."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
