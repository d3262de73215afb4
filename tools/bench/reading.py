"""Random rows of a gzip HDF5 file, to the tensors of a micro-batch, against h5py's own indexing. And the share of a
training step that waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from data_prep.sequences import SequenceWriter
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry
from megatron.crystalcoder.training.metrics import read_metrics
from tools.bench.report import Table, interleaved

SEQUENCE, VOCABULARY, ROWS = 2048, 32032, 4000


def measure() -> Table:
    """CPU seconds per row of each way, in turn, one process, page cache warm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.h5")
        _write_rows(path)
        size = path.stat().st_size / ROWS
        order = np.random.default_rng(1).permutation(ROWS).tolist()
        one = DataSettings(paths=(path,), order="shuffled")
        mixed = DataSettings(mixture=(MixtureEntry(path, 0.7), MixtureEntry(path, 0.3)), order="shuffled")
        ways: dict[str, Callable[[], object]] = {
            "h5py, dataset[i]": lambda: _h5py(path, order),
            "rows, one at a time": lambda: _rows(one, order),
        }
        for size_b in (1, 2, 8):
            ways[f"micro-batches of {size_b}"] = lambda b=size_b: _batches(one, b)  # type: ignore[misc]
        ways["micro-batches of 2, a mixture"] = lambda: _batches(mixed, 2)
        seconds = interleaved(ways, rounds=3, clock=time.process_time)
        share = _share_of_a_step(Path(folder), path)
    base = seconds["h5py, dataset[i]"]
    return Table(
        "reading",
        "Reading rows",
        f"{ROWS:,} rows of {SEQUENCE} token ids, Zipf-distributed (harder to deflate than text or code: {size:,.0f} "
        "bytes a row), in random order, page cache warm, one process; CPU seconds, best of 3. Micro-batches are the "
        "tensors that the model takes, checked.\n"
        f"A step of the tiny model waits for data {share:.2%} of its time on this CPU.",
        ("way", "µs / row", "rows / s and core", "speed-up"),
        [(way, f"{s / ROWS * 1e6:.1f}", f"{ROWS / s:,.0f}", f"{base / s:.1f}") for way, s in seconds.items()],
    )


def _write_rows(path: Path) -> None:
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    ranks = np.searchsorted(np.cumsum(shares / shares.sum()), generator.random((ROWS, SEQUENCE + 1)))
    ids = generator.permutation(VOCABULARY)[ranks.clip(max=VOCABULARY - 1)].astype(np.int32)
    with SequenceWriter(path, SEQUENCE) as writer:
        writer.write(np.stack([ids[:, :-1], np.ones_like(ids[:, 1:]), ids[:, 1:]], axis=1))


def _h5py(path: Path, order: list[int]) -> None:
    with h5py.File(path) as file:
        dataset = file["data"]
        for index in order:
            dataset[index]


def _rows(settings: DataSettings, order: list[int]) -> None:
    rows, _ = open_data(settings, seq_length=SEQUENCE, vocab_size=VOCABULARY)
    for index in order:
        rows[index]


def _batches(settings: DataSettings, size: int) -> None:
    rows, order = open_data(settings, seq_length=SEQUENCE, vocab_size=VOCABULARY)
    batches = micro_batches(rows, order, consumed_samples=0, micro_batch_size=size, dp_rank=0, dp_size=1)
    for _ in islice(batches, ROWS // size):
        pass


def _share_of_a_step(folder: Path, path: Path) -> float:
    """Of six steps of params/tiny/phase1.yaml at this vocabulary and length, the first left out."""
    repository = Path(__file__).resolve().parents[2]
    sizes = [f"{section}.vocab_size={VOCABULARY}" for section in ("train_input", "eval_input", "model")]
    sizes += [f"model.max_position_embeddings={SEQUENCE}", "runconfig.max_steps=6", "runconfig.checkpoint_steps=0"]
    sizes += [f"train_input.mixture.{i}.data_dir={path}" for i in (0, 1)]
    sizes += ["train_input.batch_size=4"]
    command = [sys.executable, "-m", "tools.cli", "pretrain", "--params", "params/tiny/phase1.yaml"]
    subprocess.run(
        [*command, "--model_dir", str(folder / "run"), *sizes], cwd=repository, check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    lines = read_metrics(folder / "run/metrics.jsonl")
    return sum(line["data_wait_s"] for line in lines[1:]) / (lines[-1]["elapsed_s"] - lines[0]["elapsed_s"])
