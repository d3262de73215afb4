"""Learning rate as a pure function of how far the run is. Nothing is stored: resuming needs no scheduler state."""

from __future__ import annotations

import math

from megatron.crystalcoder.training.config import PiecewiseSchedule, Schedule, ScheduleSegment, WarmupDecay


def learning_rate(schedule: Schedule, *, step: int, samples: float) -> float:
    """The unscaled groups' learning rate of the next optimizer step.

    step: optimizer steps done before it. samples: sequences done before it. Both start at 0, so a schedule that warms
    up from 0 makes its first step at lr 0 (the moments are updated, the weights stay): what the reference does.
    """
    if isinstance(schedule, WarmupDecay):
        return _warmup_decay(schedule, samples)
    return _piecewise(schedule, step)


def _warmup_decay(schedule: WarmupDecay, samples: float) -> float:
    """Megatron's formula: linear to `lr` over the warm-up, then `style` to `min_lr` at decay_samples, then flat."""
    warmup, decay = schedule.warmup_samples, schedule.decay_samples
    if warmup > 0 and samples <= warmup:
        return schedule.lr * samples / warmup
    if schedule.style == "constant":
        return schedule.lr
    if samples > decay:
        return schedule.min_lr
    done = (samples - warmup) / (decay - warmup) if decay > warmup else 1.0
    remaining = 1.0 - done if schedule.style == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
    return schedule.min_lr + remaining * (schedule.lr - schedule.min_lr)


def _piecewise(schedule: PiecewiseSchedule, step: int) -> float:
    """The segment that holds `step`, counted from its own start; past the last one, that one goes on."""
    start = 0
    for segment in schedule.segments:
        if step < start + segment.steps:
            return _segment(segment, step - start)
        start += segment.steps
    last = schedule.segments[-1]
    return _segment(last, step - start + last.steps)


def _segment(segment: ScheduleSegment, step: int) -> float:
    """The CS-2 toolchain's formulas. Exponential goes on past its steps; the others stay at their end."""
    initial, end, steps = segment.initial, segment.end, segment.steps
    if segment.scheduler == "Constant":
        return initial
    if segment.scheduler == "Exponential":
        return float(initial * segment.decay_rate ** (step // steps if segment.staircase else step / steps))
    if segment.scheduler == "Polynomial":
        return float(end + (initial - end) * (1.0 - min(step, steps) / steps) ** segment.power)
    if segment.scheduler == "CosineDecay":
        done = min(step, steps) / steps if steps else 1.0
        return end + (initial - end) * (1.0 + math.cos(math.pi * done)) / 2.0
    if step >= steps:
        return end
    return end + (initial - end) * (1.0 - step / steps)
