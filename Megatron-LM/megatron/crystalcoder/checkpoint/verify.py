"""What is wrong with a set of weights, told by the tensor's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.model.config import ModelConfig


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise InputError naming the first missing, extra or mis-shaped tensor."""
    for name, shape in expected.items():
        if name not in found:
            others = sum(other not in found for other in expected) - 1
            raise InputError(
                f"{where}: tensor {name} is missing{f' (and {others} more)' if others else ''}: "
                "the checkpoint is incomplete, or its configuration names another size"
            )
        if tuple(found[name]) != tuple(shape):
            raise InputError(
                f"{where}: tensor {name} has shape {list(found[name])}, but the configuration asks for {list(shape)}: "
                "correct the configuration or take the checkpoint it belongs to"
            )
    extra = [name for name in found if name not in expected]
    if extra:
        raise InputError(
            f"{where}: tensor {extra[0]}{f' (and {len(extra) - 1} more)' if len(extra) > 1 else ''} does not belong to "
            "this model: the configuration names another size, or this is another architecture"
        )


def check_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return the tensor; raise InputError if it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where}: tensor {name} has NaN or infinite values: take a checkpoint from before they arose")
    return tensor


class Cast:
    """A source whose tensors are checked to be finite and brought to one dtype (None: each keeps its own)."""

    def __init__(self, source: WeightSource, dtype: torch.dtype | None, where: str) -> None:
        self.config: ModelConfig = source.config
        self._source, self._dtype, self._where = source, dtype, where

    def names(self) -> Iterable[str]:
        return self._source.names()

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        tensor = check_finite(self._source.read(name), name, self._where)
        if self._dtype in (None, tensor.dtype):
            return tensor
        cast = tensor.to(self._dtype)
        if not bool(torch.isfinite(cast).all()):
            raise InputError(
                f"{self._where}: tensor {name} does not fit {str(self._dtype).removeprefix('torch.')}: "
                "its largest value overflows; choose --dtype bfloat16 or float32"
            )
        return cast


def check_equal(written: WeightSource, source: WeightSource, where: Path) -> None:
    """Raise RuntimeError unless both give the same tensors, bit for bit: a fault of ours or the disk, not of input."""
    for name in source.names():
        expected, found = source.read(name), written.read(name)
        if expected.dtype != found.dtype or not torch.equal(expected, found):
            raise RuntimeError(f"{where}: tensor {name} was not written as it was read")
