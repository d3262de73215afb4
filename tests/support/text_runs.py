"""Runs of a tiny model on real text, to compare the curves of their losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_prep.sequences import SequenceWriter
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import DataSettings, WarmupDecay
from support.reference_model import TINY
from support.training_runs import column, tiny_config, tiny_weights

PADDED = TINY.padded(TINY.vocab_size, 192)  # 172 is no multiple of 16, as fp8 wants; halves of 192 are


def text_rows(path: Path, repo_root: Path) -> Path:
    """Sequences of the bytes of this repository's documents and sources: prose and code, no two rows alike."""
    files = sorted([*repo_root.glob("docs/*.md"), *repo_root.glob("data_prep/*.py")])
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8).astype(np.int32)
    rows = text[: len(text) // 65 * 65].reshape(-1, 65)
    with SequenceWriter(path, 64) as writer:
        writer.write(np.stack([rows[:, :-1], np.ones_like(rows[:, 1:]), rows[:, 1:]], axis=1))
    return path


def train_on(path: Path, save: Path, steps: int, parallel: ParallelConfig, **changes: Any) -> None:
    """A run of the tiny model in bf16 on this rank; its metrics are in `save`."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import train

    platform.initialize()
    config = tiny_config(path, save, parallel=parallel, bf16=True, model=PADDED, seq_length=64, train_iters=steps)
    config = replace(config, data=DataSettings(paths=(path,), order="shuffled"), global_batch_size=16)
    config = replace(config, micro_batch_size=8, schedule=WarmupDecay(3e-3, 3e-4, 160.0, 16.0 * steps, "cosine"))
    train(replace(config, **changes), initial_weights=cast(Any, tiny_weights()))


def curve(path: Path, save: Path, steps: int, **changes: Any) -> np.ndarray:
    """The losses of such a run, alone."""
    from megatron.crystalcoder import platform

    train_on(path, save, steps, ParallelConfig(), **changes)
    platform.shutdown()
    return column(save, "lm_loss")
