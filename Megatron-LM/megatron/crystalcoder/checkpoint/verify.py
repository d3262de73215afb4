"""What is wrong with a set of weights, told by the tensor's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def all_finite(values: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether numbers of a floating dtype, given as the integers of their bits, are all neither NaN nor infinite.

    The largest of them as signed integers is the largest positive number, the largest as unsigned ones the largest
    negative, and NaN and infinity are larger than all others: two passes at the speed of memory.
    """
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(_INTEGERS[dtype.itemsize]))
    sign = 1 << (8 * dtype.itemsize - 1)
    flat, step = values.reshape(-1), (1 << 20) // dtype.itemsize
    unsigned = flat.view(f"u{dtype.itemsize}")
    return all(
        flat[start : start + step].max() < infinity and unsigned[start : start + step].max() < infinity + sign
        for start in range(0, flat.size, step)
    )
