"""Collectives beside the computation: the same losses, norms, evaluations and checkpoints as one after the other.

Each parameter of the tiny model has a bucket of its own, so that its weights arrive during the forward pass.
Planted: the fused layer not waiting for its norm's weights; weights not gathered before saving; megatron-core's own
places of parameters in a checkpoint of several buckets: each fails.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training import flags
from support.distributed import run_on_ranks
from support.training_runs import column, tiny_config, tiny_weights, write_rows

SHARDED = {"use_distributed_optimizer": True}
# name -> (layout one after the other, layout overlapped)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradients": ({}, {"overlap_grad_reduce": True}),
    "gradients and weights": (SHARDED, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}),
}


def both_ways(data: Path, folder: Path, pp: int, bf16: bool, name: str) -> int:
    """Runs of 6 steps, each then carried on for 2 without overlap; the number of pieces the model was cut into."""
    from megatron.crystalcoder.training import loop

    real = loop.DistributedDataParallelConfig
    loop.DistributedDataParallelConfig = cast(Any, partial(real, bucket_size=1))
    for way, layout in zip(("apart", "overlapped"), CASES[name], strict=True):
        config = tiny_config(data)
        config = tiny_config(
            data,
            folder / name / way,
            train_iters=6,
            parallel=ParallelConfig(pipeline_model_parallel_size=pp, **layout),
            bf16=bf16,
            eval_data=(config.data,),
            eval_interval=4,
            eval_iters=1,
            save_interval=3,
        )
        loop.train(config, initial_weights=cast(Any, tiny_weights()))
        later = ParallelConfig(
            pipeline_model_parallel_size=pp, use_distributed_optimizer="use_distributed_optimizer" in layout
        )
        more = replace(config, load=config.save, save=folder / name / f"{way}, on", train_iters=8, parallel=later)
        loop.train(more)
    model, _ = loop.build(config, loop.find_start(config, cast(Any, tiny_weights())))
    buckets = len(model.bucket_groups)
    loop.DistributedDataParallelConfig = real
    return buckets


def check(folder: Path, name: str) -> None:
    apart, overlapped = (folder / name / way for way in ("apart", "overlapped"))
    for key in ("lm_loss", "grad_norm"):
        for end in ("", ", on"):
            np.testing.assert_allclose(
                column(f"{overlapped}{end}", key), column(f"{apart}{end}", key), rtol=1e-6, err_msg=f"{name}: {key}"
            )
    losses = [
        [json.loads(line)["eval_loss"] for line in (run / "eval.jsonl").read_text().splitlines()]
        for run in (overlapped, apart)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    mine, theirs = (open_checkpoint(path).weights for path in (overlapped, apart))
    for tensor in theirs.names():
        torch.testing.assert_close(
            mine.read(tensor), theirs.read(tensor), rtol=1e-5, atol=1e-6, msg=f"{name}: {tensor}"
        )


@pytest.mark.parametrize("name", [pytest.param("gradients", marks=pytest.mark.slow), "gradients and weights"])
def test_overlapped_is_the_same_run(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "rows.jsonl")
    buckets = run_on_ranks(2, both_ways, tmp_path / "rows.jsonl", tmp_path, 1, False, name)
    assert min(buckets) > 40
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_overlapped_is_the_same_run_over_a_pipeline(tmp_path: Path, bf16: bool) -> None:
    write_rows(tmp_path / "rows.jsonl")
    run_on_ranks(4, both_ways, tmp_path / "rows.jsonl", tmp_path, 2, bf16, "gradients and weights")
    check(tmp_path, "gradients and weights")


def test_gathering_needs_the_distributed_optimizer() -> None:
    text = (
        "--data-path rows.jsonl --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 1e-3 "
        "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 172 --vocab-size 256 "
        "--overlap-param-gather"
    )
    for more in ("", " --overlap-grad-reduce", " --use-distributed-optimizer"):
        with pytest.raises(InputError, match="--overlap-param-gather needs"):
            flags.parse((text + more).split())
    parallel = flags.parse((text + " --overlap-grad-reduce --use-distributed-optimizer").split()).parallel
    assert parallel.overlap_param_gather
    assert parallel.overlap_grad_reduce
