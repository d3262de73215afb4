"""Run a function of tensors as it stands, or compiled by torch into one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def maybe_compiled(function: F, compiled: bool) -> F:
    """`function`, or its compiled form; the same for the whole process, so that it is compiled once per shape."""
    return _compiled(function) if compiled else function


@cache
def _compiled(function: Any) -> Any:
    inner = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Without function modes: the CPU seam's (see platform.py) has nothing to answer inside a kernel.
        with torch._C.DisableTorchFunction():
            return inner(*args, **kwargs)

    return call
