"""`make bench-train` compares runs that are the same: every way's losses on a tiny model, step by step.

Planted: labels shifted once more in transformers.Trainer's loss, and LR doubled in the plain loop: each fails.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from tools.bench import train, train_ways


class _Enough(Exception):
    pass


def first_losses(way: Callable[..., None], config: Any, steps: int = 4) -> list[float]:
    losses: list[float] = []

    def done(loss: float) -> None:
        losses.append(loss)
        if len(losses) == steps:
            raise _Enough

    with pytest.raises(_Enough):
        way(config, done)
    return losses


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from dataclasses import replace

    model = replace(
        train_ways.MODEL, vocab_size=128, hidden_size=64, num_layers=2, num_attention_heads=4, ffn_hidden_size=172
    )
    for module in (train, train_ways):
        monkeypatch.setattr(module, "MODEL", model)
        monkeypatch.setattr(module, "SEQUENCE", 32)
    train._write_rows(tmp_path / "rows.h5")
    return tmp_path / "rows.h5"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_way_is_the_same_run(tiny: Path, precision: str) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (the extra 'bench')")
    config = train_ways.config(tiny, bf16=precision == "bf16")
    plain = first_losses(train_ways.plain_pytorch, config)
    assert plain[-1] < plain[0]
    for way in (train_ways.this_trainer, train_ways.transformers_trainer):
        assert first_losses(way, config) == pytest.approx(plain, abs=train.TOLERANCE[precision]), way.__name__
    platform.shutdown()


def test_missing_accelerate_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs accelerate.*\[bench\]"):
        train.measure()
