"""AdamW whose moments lie packed between the steps (see moments.py); the update itself is in fp32, piece by piece.

megatron-core saves and loads moments by looking into `state`, where it finds nothing but inside `whole_moments`: there
they are fp32 tensors in the host's memory. So a checkpoint is the same whatever the moments were kept in, and a run may
go on with others than it began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron.crystalcoder import platform
from megatron.crystalcoder.model.kernels.compiled import maybe_compiled
from megatron.crystalcoder.training.moments import BLOCK, OptimizerStates, Packed, pack, packed_zeros, unpack

# Numbers that are unpacked at a time: their fp32 moments are all the memory that a step needs more. Whole blocks.
PIECE = (1 << 16) * BLOCK


class CompactAdamW(platform.GroupStepAdamW):
    """As GroupStepAdamW, with moments kept in `kind`: bf16 or 8bit. compiled: packing is."""

    def __init__(self, *args: Any, kind: OptimizerStates, compiled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind, self.compiled = kind, compiled
        # Parameter -> m and v (in 8bit its root) of each piece.
        self.packed: dict[Any, list[tuple[Packed, Packed]]] = {}

    def update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """One update of these parameters, of which each has a gradient."""
        for parameter in parameters:
            if parameter not in self.packed:
                self.packed[parameter] = self._new(parameter)
            pieces = self.packed[parameter]
            flat, gradient = parameter.detach().view(-1), parameter.grad.view(-1)
            for number, moments in enumerate(pieces):
                here = slice(number * PIECE, (number + 1) * PIECE)
                piece: Any = flat[here]
                piece.grad = gradient[here]
                mean, square = (maybe_compiled(unpack, self.compiled, any_size=True)(each) for each in moments)
                self.state[piece] = {"exp_avg": mean, "exp_avg_sq": self._squared(square)}
                super().update(group, [piece])
                state = self.state.pop(piece)
                pieces[number] = self._packed(state["exp_avg"], state["exp_avg_sq"], _seed(group, parameter, number))

    def unpack_all(self) -> None:
        """Put all moments into `state`, in fp32 and in the host's memory."""
        for group in self.param_groups:
            for parameter in group["params"]:
                moments = self.packed.pop(parameter, None) or self._new(parameter)
                for key, which in (("exp_avg", 0), ("exp_avg_sq", 1)):
                    values = [unpack(piece[which]).cpu() for piece in moments]
                    whole = torch.cat([self._squared(each) if which else each for each in values])
                    self.state[parameter][key] = whole.view(parameter.shape)

    def pack_all(self) -> None:
        """The reverse; `state` is empty afterwards."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.pop(parameter)
                moments = (state[key].view(-1).split(PIECE) for key in ("exp_avg", "exp_avg_sq"))
                self.packed[parameter] = [
                    self._packed(mean.to(parameter.device), square.to(parameter.device), 0)
                    for mean, square in zip(*moments, strict=True)
                ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but the moments stay in the host's memory, where `whole_moments` wants them."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])

    def _new(self, parameter: Any) -> list[tuple[Packed, Packed]]:
        sizes = [min(PIECE, parameter.numel() - start) for start in range(0, parameter.numel(), PIECE)]
        return [tuple(packed_zeros(size, self.kind, parameter.device) for _ in range(2)) for size in sizes]  # type: ignore[misc]

    def _packed(self, mean: Tensor, square: Tensor, seed: int) -> tuple[Packed, Packed]:
        packing, chance = (
            maybe_compiled(pack, self.compiled, any_size=True),
            torch.full((), seed, dtype=torch.int32, device=mean.device),
        )
        second = square.sqrt() if self.kind == "8bit" else square
        return packing(mean, self.kind, chance), packing(second, self.kind, ~chance)

    def _squared(self, root: Tensor) -> Tensor:
        return root.square() if self.kind == "8bit" else root


def _seed(group: dict[str, Any], parameter: Tensor, piece: int) -> int:
    """Of the chance by which moments are rounded: that of a parameter of this size at this step, the same on every rank
    that has a copy of it."""
    return (group.get("step", 0) * 0x9E3779B1 + parameter.numel() * 0x85EBCA77 + piece * 0xC2B2AE3D) & 0x7FFFFFFF


@contextmanager
def whole_moments(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, packed moments are whole, to be saved or loaded. Of others nothing changes."""
    inner: Any = optimizer
    compact = [each.optimizer for each in inner.chained_optimizers if isinstance(each.optimizer, CompactAdamW)]
    for each in compact:
        each.unpack_all()
    try:
        yield
    finally:
        for each in compact:
            each.pack_all()
