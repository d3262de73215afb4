"""Random weights and rows to train on that are made in no time: of their values nothing depends on but realism."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.sequences import SequenceWriter
from megatron.crystalcoder.checkpoint.weights import logical_shapes
from megatron.crystalcoder.model.config import ModelConfig

_TILE = 1 << 20


class TiledWeights:
    """A WeightSource of bf16 normal numbers of which a million are drawn and repeated; norms are 1, biases 0.

    device: where they are made, and put in order.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        self.config, self._shapes, self._device = config, logical_shapes(config), device
        generator = torch.Generator().manual_seed(1)
        self._tile = (torch.randn(_TILE, generator=generator) * 0.02).bfloat16().to(device)

    def names(self) -> Iterable[str]:
        """All logical tensors."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """bf16, of all."""
        return torch.bfloat16

    def read(self, name: str) -> Tensor:
        """One tensor."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16, device=self._device)
        count = int(np.prod(shape))
        return self._tile.repeat(-(-count // _TILE))[:count].view(shape)


def random_rows(path: Path, vocab_size: int, seq_length: int, rows: int = 64) -> Path:
    """Write a sequence file of uniformly random tokens, every one a loss position; returns `path`."""
    ids = np.random.default_rng(0).integers(3, vocab_size, (rows, seq_length + 1), dtype=np.int32)
    with SequenceWriter(path, seq_length) as writer:
        writer.write(np.stack([ids[:, :-1], np.ones_like(ids[:, 1:]), ids[:, 1:]], axis=1))
    return path
