"""Where the time of a training step goes, by parts of the model, from torch's profiler.

Ranges are opened by hooks around what is called in the forward pass. A backward operation belongs to the range of the
forward operation whose autograd sequence number it carries; so does what it launches on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("attention", "MLP", "norms", "loss", "optimizer", "rest")  # norms: with the residual additions
_PREFIX = "part of the step: "
# Ranges that the trainer itself opens in each step.
_TRAINERS = {"gradient norm": "optimizer", "optimizer": "optimizer"}


def breakdown(step: Callable[[], object], model: Any, *, seconds: float) -> dict[str, float]:
    """Seconds of each of PARTS in one call of `step`, and "idle", what is left of `seconds`, its time unprofiled.

    attention and MLP include their linear layers. On a GPU the time is the kernels', and nothing is returned where the
    profiler may not see them; on a CPU the operations' own.
    model: a CrystalCoderGPT, wrapped or not.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _ranges(model), profile(activities=activities) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events: Any = profiler.events()
    if torch.cuda.is_available() and not any(event.kernels for event in events):
        return {}
    found = attribute(events)
    return {**found, "idle": max(0.0, seconds - sum(found.values()))}


def attribute(events: Any) -> dict[str, float]:
    """Seconds of each of PARTS, of a profile's events."""
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    forward: dict[tuple[int, int], str] = {}
    ranges = {id(event): _range(event) for event in on_cpu}
    for event in on_cpu:
        part = ranges[id(event)]
        if part and event.sequence_nr >= 0:
            forward.setdefault((event.thread, event.sequence_nr), part)
    on_gpu = any(event.kernels for event in on_cpu)
    found = dict.fromkeys(PARTS, 0.0)
    for event in on_cpu:
        if on_gpu:
            microseconds = sum(kernel.duration for kernel in event.kernels)
        else:
            is_range = event.name.startswith(_PREFIX) or event.name in _TRAINERS
            microseconds = 0.0 if is_range else event.self_cpu_time_total
        if microseconds:
            found[ranges[id(event)] or _backward_of(event, forward) or "rest"] += microseconds / 1e6
    return found


def _range(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return event.name.removeprefix(_PREFIX)
        if event.name in _TRAINERS:
            return _TRAINERS[event.name]
        event = event.cpu_parent
    return None


def _backward_of(event: Any, forward: dict[tuple[int, int], str]) -> str | None:
    while event is not None:
        part = forward.get((event.fwd_thread, event.sequence_nr))
        if part and event.sequence_nr >= 0:
            return part
        event = event.cpu_parent
    return None


@contextmanager
def _ranges(model: Any) -> Iterator[None]:
    """Ranges around the parts' forward passes; gone afterwards. The optimizer's are the trainer's own."""
    while hasattr(model, "module"):
        model = model.module
    hooks: list[Any] = []
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        hooks += _between(attention.linear_qkv, attention.linear_proj, "attention")
        hooks += _between(mlp.linear_fc1, mlp.linear_fc2, "MLP")
        hooks += _between(layer, layer, "norms")  # what is in neither of the two inside it
    hooks += _between(model.decoder.final_layernorm, model.decoder.final_layernorm, "norms")
    model._postprocess = _within(model._postprocess, "loss")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del model._postprocess  # the class's own shows again


def _between(first: Any, last: Any, part: str) -> list[Any]:
    opened: list[Any] = []

    def open_range(*_: Any) -> None:
        opened.append(torch.profiler.record_function(_PREFIX + part))
        opened[-1].__enter__()

    def close_range(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [first.register_forward_pre_hook(open_range), last.register_forward_hook(close_range)]


def _within(method: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_PREFIX + part):
            return method(*args, **kwargs)

    return call
