"""Data for the tiny params files, and overrides that make a run of them take seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.sequence_rows import write_h5

S, V = 32, 128
SMALL = [
    f"model.vocab_size={V}", f"train_input.vocab_size={V}", f"eval_input.vocab_size={V}", "model.num_hidden_layers=2",
    f"model.max_position_embeddings={S}", f"model.loss_weight={1 / S}", "train_input.batch_size=8",
    "runconfig.max_steps=6", "runconfig.checkpoint_steps=3", "runconfig.eval_steps=4", "eval_input.batch_size=4",
    "optimizer.learning_rate.0.steps=2", "runconfig.log_steps=1",
]  # fmt: skip


def write_data(root: Path, rows: int = 24) -> Path:
    """Sequences in which each token decides the next but one bit; a sixth of the mask is 0. Returns `root`."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("prose", "code", "code_fim", "code_fim_0.3", "val")):
        successor = np.random.default_rng(number).integers(0, V, (V, 2))
        text = np.empty((rows, S + 1), dtype=np.int32)
        text[:, 0] = generator.integers(0, V, rows)
        for t in range(S):
            text[:, t + 1] = successor[text[:, t], generator.integers(0, 2, rows)]
        mask = (generator.random((rows, S)) > 1 / 6).astype(np.int32)
        write_h5(root / "data" / name / "data-00000.h5", np.stack([text[:, :-1], mask, text[:, 1:]], axis=1))
    return root
