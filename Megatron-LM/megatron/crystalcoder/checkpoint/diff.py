"""Compare two checkpoints of any format by logical tensor, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Files, Scratch, Stored, read_rows, transposed_into
from megatron.crystalcoder.checkpoint.hf_config import hf_values
from megatron.crystalcoder.checkpoint.open import Checkpoint
from megatron.crystalcoder.checkpoint.placement import BlockWeights, combined
from megatron.crystalcoder.checkpoint.torch_dist_reader import open_optimizer
from megatron.crystalcoder.checkpoint.transfer import jobs_of

_VALUES = 1 << 22  # compared at a time, where tensors differ


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs. `what` says it where the values cannot be compared (missing, another shape).

    unequal: values whose numbers differ, of `count`; max_abs: the largest difference of two finite ones; rounded: they
    are equal once both are rounded to the coarser of the two dtypes; not_finite: NaN or infinite on a side.
    """

    name: str
    what: str = ""
    dtypes: str = ""
    unequal: int = 0
    count: int = 0
    max_abs: float = 0.0
    rounded: bool = False
    not_finite: int = 0

    def __str__(self) -> str:
        if self.what:
            return f"{self.name}: {self.what}"
        parts = [self.dtypes] if self.dtypes else []
        if self.unequal:
            share = f"{self.unequal:,} of {self.count:,} values differ, at most by {self.max_abs:.3g}"
            parts.append(f"{share}{' (the rounding of the dtype)' if self.rounded else ''}")
        elif self.dtypes:
            parts.append("values equal")
        if self.not_finite:
            parts.append(f"{self.not_finite:,} NaN or infinite")
        return f"{self.name}: {', '.join(parts)}"


def config_differences(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Sizes and constants that the two models differ in, as `name: a, b`. Padding and layout are no part of a model."""
    one, other = (_facts(checkpoint) for checkpoint in (first, second))
    return [f"{name}: {one[name]}, {other[name]}" for name in one if name in other and one[name] != other[name]]


def _facts(checkpoint: Checkpoint) -> dict[str, object]:
    facts = hf_values(checkpoint.config.unpadded) | {"rotary_interleaved": checkpoint.config.rotary_interleaved}
    if checkpoint.mup_recorded:
        return facts
    return {name: value for name, value in facts.items() if not name.startswith(("mup_", "rotary_interleaved"))}


def diff(
    first: Checkpoint, second: Checkpoint, *, workers: int, progress: Callable[[int], None] = lambda nbytes: None
) -> Iterator[TensorDifference]:
    """The tensors that differ, in the order of the first checkpoint. Optimizer state that both hold counts too.

    Values are compared as numbers in fp64; equal bits are equal, whatever they mean. Rows that pad a vocabulary and
    zeros that pad an FFN are no part of the tensors. progress: called with the bytes of the first that are done.
    Raises InputError for files that cannot be read.
    """
    one, other = tensors_of(first), tensors_of(second)
    names = [*one.stored, *(name for name in other.stored if name not in one.stored)]

    def compare(name: str) -> tuple[TensorDifference | None, int]:
        return _compare(files, name, *(x.locate(name) if name in x.stored else None for x in (one, other)))

    with Files() as files, ThreadPoolExecutor(workers) as pool:
        for found, nbytes in pool.map(compare, names):
            progress(nbytes)
            if found is not None:
                yield found


def tensors_of(checkpoint: Checkpoint) -> BlockWeights:
    """The logical tensors of the weights and, with its prefix, of optimizer state that is stored by parameters."""
    sets = {"": checkpoint.weights}
    if checkpoint.format == "torch_dist" and checkpoint.adapter is None:
        with suppress(InputError):  # stored by ranks: no state of a tensor to speak of
            sets |= open_optimizer(checkpoint.folder, checkpoint.config)
    return combined(sets)


def _compare(
    files: Files, name: str, first: Stored | None, second: Stored | None
) -> tuple[TensorDifference | None, int]:
    if first is None or second is None:
        known = first or second
        assert known is not None
        which = "second" if second is None else "first"
        return TensorDifference(name, f"not in the {which} checkpoint"), first.nbytes if first else 0
    if first.shape != second.shape:
        return TensorDifference(name, f"shape {list(first.shape)}, {list(second.shape)}"), first.nbytes
    found = TensorDifference(name, count=torch.Size(first.shape).numel(), rounded=True)
    if first.dtype != second.dtype:
        both = [str(x.dtype).removeprefix("torch.") for x in (first, second)]
        found = replace(found, dtypes=f"{both[0]}, {both[1]}")
    scratches = Scratch(), Scratch()
    for job in jobs_of(first, second, name):
        one, other = (
            read_rows(files, stored, stored.copies[0], job.rows, scratch)
            for stored, scratch in zip((first, second), scratches, strict=True)
        )
        if first.transposed != second.transposed:
            other = transposed_into(scratches[1].array("turned", other.shape[::-1], other.itemsize), other)
        if first.dtype == second.dtype and np.array_equal(one, other):
            continue
        for values in _in_parts(one, other):
            found = _with(found, *(x.view(dtype) for x, dtype in zip(values, (first.dtype, second.dtype), strict=True)))
    is_same = not (found.dtypes or found.unequal or found.not_finite)
    return (None if is_same else found), first.nbytes


def _in_parts(first: np.ndarray, second: np.ndarray) -> Iterable[tuple[Tensor, Tensor]]:
    flat = torch.from_numpy(first.reshape(-1)), torch.from_numpy(second.reshape(-1))
    return zip(*(x.split(_VALUES) for x in flat), strict=True)


def _with(found: TensorDifference, first: Tensor, second: Tensor) -> TensorDifference:
    coarser = min((first.dtype, second.dtype), key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
    rounded = bool((first.to(coarser) == second.to(coarser)).all())
    one, other = first.double(), second.double()
    finite = one.isfinite() & other.isfinite()
    both = torch.where(finite, one - other, 0).abs()
    return replace(
        found,
        unequal=found.unequal + int((one != other).sum()),
        max_abs=max(found.max_abs, float(both.max())),
        rounded=found.rounded and rounded and first.dtype != second.dtype,
        not_finite=found.not_finite + int((~finite).sum()),
    )


def refuse_incomparable(first: Checkpoint, second: Checkpoint) -> None:
    """Raise InputError for checkpoints that hold an adapter: their weights are the base's."""
    for checkpoint in (first, second):
        if checkpoint.adapter is not None:
            raise InputError(
                f"{checkpoint.path}: holds an adapter and not weights: export it first (crystalcoder finetune export)"
            )
