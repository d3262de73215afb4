"""Run a function of tensors as it stands, or compiled by torch into one kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Shapes that one function is compiled for. torch's own limit of 8 ends the run; a model in fp8 has a dozen.
_MOST_SHAPES = 256
# torch keeps its settings by thread, and the backward pass on a GPU is in one of its own.
_thread = threading.local()


def maybe_compiled(function: F, compiled: bool, *, any_size: bool = False) -> F:
    """`function`, or its compiled form; the same for the whole process, so that it is compiled once per shape.

    any_size: once for all sizes, for functions that are given many.
    """
    return _compiled(function, any_size) if compiled else function


@cache
def _compiled(function: Any, any_size: bool) -> Any:
    inner = torch.compile(function, fullgraph=True, dynamic=any_size)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not getattr(_thread, "limits_raised", False):
            _raise_limits()
        # Without function modes: the CPU seam's (see platform.py) has nothing to answer inside a kernel.
        with torch._C.DisableTorchFunction():
            return inner(*args, **kwargs)

    return call


def _raise_limits() -> None:
    import torch._dynamo.config as limits

    for name in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(limits, name):  # the names changed with torch 2.6
            setattr(limits, name, max(getattr(limits, name), _MOST_SHAPES))
    _thread.limits_raised = True
