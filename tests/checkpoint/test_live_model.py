"""Converted checkpoints in live megatron-core models, and live models' checkpoints in the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.distributed import run_on_ranks
from support.reference_model import TINY


def _on_each_rank(folder: str, layouts: list[tuple[int, int]]) -> list[Any]:
    """Names and differences found on this rank; at the last layout, save the model in both formats."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.directory import iteration_directory, rank_file, write_tracker
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.checkpoint.megatron_args import to_args
    from megatron.crystalcoder.checkpoint.weights import rank_state_dict
    from megatron.crystalcoder.model.config import ParallelConfig
    from megatron.crystalcoder.model.gpt import build_model

    different: list[Any] = []
    for tp, pp in layouts:
        parallel = ParallelConfig(tp, pp)
        platform.initialize_model_parallel(parallel)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        source = open_checkpoint(f"{folder}/hf")
        expected = rank_state_dict(
            source.weights, source.config, tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp
        )

        def check(model: torch.nn.Module, how: str, expected: dict[str, Any] = expected, at: Any = (tp, pp)) -> None:
            found = dict(model.named_parameters())
            if found.keys() != expected.keys():
                different.append((at, how, sorted(found.keys() ^ expected.keys())))
            different.extend((at, how, name) for name, x in found.items() if not torch.equal(x, expected[name]))

        for name in ("hf", "torch", "torch_dist"):
            model = build_model(TINY, parallel)
            load_weights(model, open_checkpoint(f"{folder}/{name}").weights, TINY, parallel)
            check(model, f"load_weights from {name}")
        model = build_model(TINY, parallel)
        wanted = {"model": model.sharded_state_dict()}
        loaded = dist_checkpointing.load(wanted, str(iteration_directory(Path(folder, "torch_dist"), 1)))
        model.load_state_dict(loaded["model"])
        check(model, "dist_checkpointing.load")
        model = build_model(TINY, parallel)
        model.load_state_dict(expected, strict=True)
        check(model, "rank_state_dict")

    # As training saves them: `torch_dist` by megatron-core, `torch` as one state dict per rank.
    args = to_args(TINY, tp, pp)
    saved = [iteration_directory(Path(folder, name), 7) for name in ("run_dist", "run_torch")]
    if torch.distributed.get_rank() == 0:
        for directory in saved:
            directory.mkdir(parents=True)
            write_tracker(directory.parent, 7)
    torch.distributed.barrier()
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save({**content, "model": model.sharded_state_dict()}, str(saved[0]))
    file = rank_file(saved[1], tp_rank, pp_rank, pp)
    file.parent.mkdir()
    torch.save({**content, "model": model.state_dict()}, file)
    return different


@pytest.mark.parametrize("layouts", [[(1, 1)], [(1, 4), (2, 2)]])
def test_live_models(tmp_path: Path, layouts: list[tuple[int, int]]) -> None:
    """Planted: the two norms' keys exchanged when torch_dist is written: dist_checkpointing.load fills both wrongly;
    torch_dist written without the linears' extra state: dist_checkpointing.load raises."""
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    convert(hf, tmp_path / "torch", format="torch", tensor_parallel=2, pipeline_parallel=4)
    convert(hf, tmp_path / "torch_dist", format="torch_dist")
    world_size = layouts[0][0] * layouts[0][1]
    assert run_on_ranks(world_size, _on_each_rank, str(tmp_path), layouts) == [[]] * world_size
    for name in ("run_dist", "run_torch"):
        assert_same_tensors(tmp_path / name, weights)
        checkpoint = open_checkpoint(tmp_path / name)
        assert (checkpoint.iteration, checkpoint.is_converted, checkpoint.config) == (7, False, TINY)
        convert(tmp_path / name, tmp_path / f"{name}_hf", format="hf")
        assert_same_tensors(tmp_path / f"{name}_hf", weights)
