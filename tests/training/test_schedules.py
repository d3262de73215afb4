"""Learning rates against the formulas, at the places where they bend."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron.crystalcoder.training.config import PiecewiseSchedule, ScheduleSegment, WarmupDecay
from megatron.crystalcoder.training.schedules import learning_rate


def at(schedule: WarmupDecay | PiecewiseSchedule, step: int, batch: int = 1024) -> float:
    return learning_rate(schedule, step=step, samples=step * batch)


def test_reference_7b_run() -> None:
    """1600 iterations of 1024, warm-up fraction 0.001: W = 1638.4 samples, so steps at 0, 1.25e-4, then cosine.

    Planted: warm-up counted after the step -> 1.25e-4 first; W rounded to whole iterations -> 2e-4 second.
    """
    schedule = WarmupDecay(2e-4, 2e-5, 0.001 * 1600 * 1024, 1600 * 1024, "cosine")
    assert at(schedule, 0) == 0.0
    assert at(schedule, 1) == pytest.approx(1.25e-4, rel=1e-12)
    share = (2 * 1024 - 1638.4) / (1600 * 1024 - 1638.4)
    assert at(schedule, 2) == pytest.approx(2e-5 + 1.8e-4 * 0.5 * (1 + math.cos(math.pi * share)), rel=1e-12)
    assert at(schedule, 1600) == pytest.approx(2e-5, rel=1e-12)
    assert at(schedule, 5000) == 2e-5


def test_styles_and_no_warmup() -> None:
    linear = WarmupDecay(1.0, 0.2, 0, 100, "linear")
    assert [learning_rate(linear, step=0, samples=n) for n in (0, 50, 100, 101)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    constant = WarmupDecay(1.0, 0.2, 10, 100, "constant")
    assert [learning_rate(constant, step=0, samples=n) for n in (0, 5, 10, 99, 1000)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    only_warmup = WarmupDecay(1.0, 0.2, 100, 100, "cosine")
    assert learning_rate(only_warmup, step=0, samples=100) == 1.0


def test_pretraining_phases() -> None:
    """Each scheduler counts from its own start; the values are the reference's, at the steps its files name.

    Planted: the second scheduler counted from the run's start -> phase 2's lr at step 86 is 0.0087790, not 0.0087825.
    """
    phase1 = PiecewiseSchedule(
        (ScheduleSegment("Linear", 0.0, 0.012, 86), ScheduleSegment("Linear", 0.012, 0.00012408, 294337))
    )
    assert at(phase1, 0) == 0.0
    assert at(phase1, 43) == pytest.approx(0.006, rel=1e-12)
    assert at(phase1, 86) == pytest.approx(0.012, rel=1e-12)
    assert at(phase1, 79721) == pytest.approx(0.0087869, abs=5e-8)
    phase2 = PiecewiseSchedule(
        (ScheduleSegment("Linear", 0.0, 0.0087825, 86), ScheduleSegment("Linear", 0.0087825, 0.00013679, 214301))
    )
    assert at(phase2, 86) == pytest.approx(0.0087825, rel=1e-12)
    assert at(phase2, 214387) == pytest.approx(0.00013679, rel=1e-12)
    assert at(phase2, 10**6) == 0.00013679


def test_cosine_and_constant_segments() -> None:
    schedule = PiecewiseSchedule(
        (ScheduleSegment("Constant", 0.5, 0.5, 3), ScheduleSegment("CosineDecay", 1.0, 0.1, 4))
    )
    expected = [0.5] * 3 + [0.1 + 0.9 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)] + [0.1] * 3
    np.testing.assert_allclose([at(schedule, step) for step in range(10)], expected, rtol=1e-12)


def test_exponential_and_polynomial_segments() -> None:
    """Each from its own start; Exponential goes on past its steps, Polynomial stays at its end.

    Planted: the exponent counted from the run's start; the power on the whole rate instead of the difference: fail.
    """
    falling = ScheduleSegment("Exponential", 1.0, 1.0, 10, decay_rate=0.5)
    stairs = ScheduleSegment("Exponential", 1.0, 1.0, 10, decay_rate=0.5, staircase=True)
    constant = ScheduleSegment("Constant", 0.5, 0.5, 3)
    for segment, expected in (
        (falling, lambda k: 0.5 ** (k / 10)),
        (stairs, lambda k: 0.5 ** (k // 10)),
        (ScheduleSegment("Polynomial", 1.0, 0.1, 10, power=2.0), lambda k: 0.1 + 0.9 * (1 - min(k, 10) / 10) ** 2),
    ):
        schedule = PiecewiseSchedule((constant, segment))
        rates = [at(schedule, step) for step in range(3, 40)]
        np.testing.assert_allclose(rates, [expected(k) for k in range(37)], rtol=1e-12)
        assert at(schedule, 2) == 0.5
