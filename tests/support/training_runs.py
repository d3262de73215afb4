"""Small training runs: a random model in memory, rows to train on, a configuration to vary, the metrics they leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.training.config import DataSettings, OptimizerSettings, TrainConfig, WarmupDecay
from support.reference_model import TINY, random_weights
from support.sequence_rows import as_objects, write_jsonl

SEQ = 32
GLOBAL_BATCH = 8


class DictWeights:
    """A WeightSource over tensors in memory."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self._weights = config, weights

    def names(self) -> list[str]:
        return list(self._weights)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype

    def read(self, name: str) -> Tensor:
        return self._weights[name]


def tiny_weights() -> DictWeights:
    """The same random weights each time."""
    return DictWeights(TINY, random_weights(TINY, seed=7))


def write_rows(path: Path, count: int = 40) -> np.ndarray:
    """JSONL rows of SEQ tokens with unequal masks (rows 4 and 5 without any loss position); int32 (count, 3, SEQ)."""
    generator = np.random.default_rng(3)
    text = generator.integers(0, TINY.vocab_size, (count, SEQ + 1), dtype=np.int32)
    share = generator.uniform(0.05, 1.0, (count, 1))
    mask = (generator.uniform(size=(count, SEQ)) < share).astype(np.int32)
    mask[4:6] = 0
    rows = np.stack([text[:, :-1], mask, text[:, 1:]], axis=1)
    write_jsonl(path, as_objects(rows))
    return rows


def tiny_config(rows_file: Path, save: Path | None = None, **changes: Any) -> TrainConfig:
    """10 steps of 8 rows with every muP constant and AdamW setting at work; `changes` replaces fields."""
    config = TrainConfig(
        model=TINY,
        data=DataSettings(paths=(rows_file,), order="single"),
        schedule=WarmupDecay(3e-3, 3e-4, 2.0 * GLOBAL_BATCH, 10.0 * GLOBAL_BATCH, "cosine"),
        optimizer=OptimizerSettings(clip_grad=1.0, weight_decay=0.1, hidden_lr_scale=TINY.mup.width_scale),
        train_iters=10,
        micro_batch_size=2,
        global_batch_size=GLOBAL_BATCH,
        seq_length=SEQ,
        save=save,
    )
    return replace(config, **changes)


def metrics_of(save: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(save) / "metrics.jsonl").read_text().splitlines()]


def column(save: Path | str, key: str) -> np.ndarray:
    """One quantity over the iterations of a run."""
    return np.array([line[key] for line in metrics_of(save)])
