"""A padded FFN computes what the model's own does, its padding stays zero, and a run keeps the sizes it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.training.plan import flops_per_token
from megatron.crystalcoder.training.speed_flags import add_speed_arguments, with_speed_flags
from support.reference_model import TINY
from support.training_runs import column, tiny_config, tiny_weights, write_rows

PADDED = TINY.padded(TINY.vocab_size, 192)


def test_training_a_padded_model(tmp_path: Path) -> None:
    """Planted: padding of ones instead of zeros, fails."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import train

    platform.initialize()
    write_rows(tmp_path / "rows.jsonl")
    config = tiny_config(tmp_path / "rows.jsonl", tmp_path / "own")
    train(config, initial_weights=cast(Any, tiny_weights()))
    padded = replace(config, model=PADDED, save=tmp_path / "padded", train_iters=6)
    train(padded, initial_weights=cast(Any, tiny_weights()))
    with pytest.raises(InputError, match=r"this run has ffn_hidden_size 192, padding included, .* --ffn-multiple-of"):
        train(replace(padded, model=TINY))
    train(replace(padded, train_iters=10))
    platform.shutdown()

    np.testing.assert_allclose(column(tmp_path / "padded", "lm_loss"), column(tmp_path / "own", "lm_loss"), rtol=2e-6)
    own, found = (open_checkpoint(tmp_path / name) for name in ("own", "padded"))
    assert (found.config.ffn_hidden_size, found.config.unpadded.ffn_hidden_size) == (192, 172)
    for name in own.weights.names():  # the model's own part of each, in which padding does not show
        if name.endswith("weight"):  # a key's bias has no gradient but rounding, which Adam makes steps of
            got, expected = found.weights.read(name), own.weights.read(name)
            assert (got - expected).norm() < 1e-3 * expected.norm(), name


def test_padding_is_still_zero_after_training(tmp_path: Path) -> None:
    """In every matrix and bias of the FFN; else conversion would refuse the checkpoint."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import train_step

    platform.initialize()
    config = tiny_config(Path(), model=PADDED, bf16=True)
    platform.initialize_model_parallel(config.parallel)
    model, optimizer = build(config, Start("test", cast(Any, tiny_weights())))
    ids = torch.randint(0, 256, (2, 33))
    positions = torch.arange(32).expand(2, 32)
    batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions, "loss_mask": torch.ones(2, 32)}
    for _ in range(3):
        train_step(model, optimizer, iter([batch] * 4), config, lr=1e-2)
    platform.shutdown()
    for layer in cast(Any, model.module).decoder.layers:
        both, down = layer.mlp.linear_fc1, layer.mlp.linear_fc2
        for tensor in (both.weight.unflatten(0, (2, 192)), both.bias.unflatten(0, (2, 192))):
            assert not tensor[:, 172:].any()
            assert tensor[:, :172].any()
        assert not down.weight[:, 172:].any()


def flags(*given: str, **config: Any) -> Any:
    import argparse

    top = argparse.ArgumentParser()
    add_speed_arguments(top)
    return with_speed_flags(tiny_config(Path("rows.jsonl"), **config), top.parse_args(given))


def test_the_flag() -> None:
    from megatron.crystalcoder.model.config import ParallelConfig
    from megatron.crystalcoder.model.lora import LoraSettings

    assert flags().model == TINY
    assert flags("--ffn-multiple-of", "64").model == PADDED
    assert flags("--ffn-multiple-of", "43").model == TINY
    assert flags("--ffn-multiple-of", "64", parallel=ParallelConfig(4)).model.ffn_hidden_size == 256
    assert flags(model=PADDED).model == PADDED  # as the checkpoint records it
    assert flags("--fp8", "emulated").speed.fp8 == "emulated"
    with pytest.raises(InputError, match="--ffn-multiple-of -1: must be at least 1"):
        flags("--ffn-multiple-of", "-1")
    with pytest.raises(InputError, match="--ffn-multiple-of does not go with --lora-rank"):
        flags("--ffn-multiple-of", "64", lora=LoraSettings(2, 4.0, ("attn.c_attn",)))
    assert flops_per_token(PADDED, 32) == flops_per_token(TINY, 32)
