"""Random initial weights as a `WeightSource`: the same numbers at any tensor- and pipeline-parallel size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron.crystalcoder.checkpoint.weights import logical_shapes
from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.model.initialization import InitSettings, initial_tensor


class RandomWeights:
    """Logical fp32 tensors drawn one by one, each from a generator seeded by (seed, tensor name)."""

    def __init__(self, config: ModelConfig, init: InitSettings, seed: int) -> None:
        self.config = config
        self._init, self._seed, self._shapes = init, seed, logical_shapes(config)

    def names(self) -> Iterable[str]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        return initial_tensor(name, self._shapes[name], self._init, self._seed)
