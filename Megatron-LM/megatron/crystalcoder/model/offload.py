"""Keep what the layers save for their backward pass in the host's memory.

Each storage is copied once, whatever tensors of it are saved (queries, keys and values are parts of one), on a stream
of its own, and comes back when the first of them is asked for. With full recomputation that is each layer's input.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.crystalcoder.model.fusions import OFFLOADED_FROM

# Storages that are remembered as copied while they are still on the device: about a layer's.
_REMEMBERED = 8


class _InHost:
    """The bytes of one storage in the host's memory, and on the device again from the first call of `back` on."""

    def __init__(self, whole: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device = whole.device
        self._on_device: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(whole)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._host.copy_(whole, non_blocking=True)
            self._copied = stream.record_event()
        whole.record_stream(stream)

    def back(self) -> Tensor:
        if self._on_device is None:
            if self._copied is not None:
                torch.cuda.current_stream().wait_event(self._copied)
            self._on_device = self._host.to(self._device, non_blocking=True, copy=True)
        return self._on_device


class _Saved(NamedTuple):
    """A tensor of an offloaded storage."""

    storage: _InHost
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class OffloadSaved(torch.autograd.graph.saved_tensors_hooks):
    """A context manager: what is saved for backward inside it lies in the host's memory until then.

    Parameters and storages of fewer than OFFLOADED_FROM bytes stay.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        # (address, bytes, version) -> the copy, and the storage itself, so that no other gets its address meanwhile.
        self._recent: OrderedDict[tuple[int, int, int], tuple[_InHost, Any]] = OrderedDict()

    def __exit__(self, *of: Any) -> None:
        self._recent.clear()
        super().__exit__(*of)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if storage.nbytes() < OFFLOADED_FROM or isinstance(tensor, torch.nn.Parameter):
            return tensor
        key = (storage.data_ptr(), storage.nbytes(), tensor._version)
        if key not in self._recent:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._recent[key] = _InHost(whole, self._stream), storage
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        return _Saved(self._recent[key][0], tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    whole = saved.storage.back()
    tensor = torch.empty(0, dtype=saved.dtype, device=whole.device)
    return tensor.set_(whole.untyped_storage(), saved.offset, saved.size, saved.stride)
