"""Small rows of random tokens, and files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sequences import SequenceWriter

S, V = 8, 50


def make_rows(n: int, seed: int = 0) -> np.ndarray:
    """int32 (n, 3, S): labels follow tokens, masks of 0 and 1."""
    generator = np.random.default_rng(seed)
    text = generator.integers(0, V, (n, S + 1), dtype=np.int32)
    return np.stack([text[:, :-1], generator.integers(0, 2, (n, S), dtype=np.int32), text[:, 1:]], axis=1)


def as_objects(rows: np.ndarray) -> list[dict[str, Any]]:
    """What a processed JSONL holds."""
    return [dict(zip(("token_ids", "loss_mask", "label_ids"), row.tolist(), strict=True)) for row in rows]


def write_jsonl(path: Path, objects: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))
    return path


def write_h5(path: Path, rows: np.ndarray) -> Path:
    with SequenceWriter(path, rows.shape[2]) as writer:
        writer.write(rows)
    return path
