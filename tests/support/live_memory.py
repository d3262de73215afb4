"""How many bytes of tensors are alive, and were at most, on any device: what an allocator would report."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A context manager. `now` and `peak`: bytes of the storages made inside it. `largest`: of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """Count the tensors in `result`, too."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)

    def outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which does not run under a dispatch mode (torch.compile): its results are counted, no more."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                result = function(*args, **kwargs)
            self.note(result)
            return result

        return call

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size
