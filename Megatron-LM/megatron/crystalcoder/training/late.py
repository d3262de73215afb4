"""Numbers on their way from the device to the host, so that nobody waits for them before they are needed."""

from __future__ import annotations

import torch
from torch import Tensor


class Copied:
    """A copy of a small tensor to the host that was begun when this was made.

    `read` waits for the copy alone: not, as `tensor.tolist()` would, for what was launched on the device after it. On a
    CPU the numbers are there at once.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers, in a list however few they are."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(number) for number in self._host.flatten().tolist()]
