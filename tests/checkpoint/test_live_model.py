"""Converted checkpoints in live megatron-core models, and live models' checkpoints in the converter."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import ParallelConfig
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.distributed import run_on_ranks
from support.reference_model import TINY


def _on_each_rank(folder: str, layouts: list[tuple[int, int]], with_foreign_args: bool) -> list[Any]:
    """Names and differences found on this rank; at the last layout, save the model in both formats."""
    from megatron.core import dist_checkpointing, parallel_state

    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.directory import iteration_directory, rank_file, write_tracker
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.checkpoint.megatron_args import to_args
    from megatron.crystalcoder.checkpoint.weights import rank_state_dict
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
        _load_as_megatron_lm(Path(folder, f"torch_{tp}_{pp}"), model, tp_rank, pp_rank, parallel)
        check(model, "the way of Megatron-LM")
        model = build_model(TINY, parallel)
        model.load_state_dict(expected, strict=True)
        check(model, "rank_state_dict")

    # As Megatron-LM saves them: `torch_dist` by megatron-core, `torch` as one state dict per rank.
    args = _megatron_lm_args(tp, pp) if with_foreign_args else to_args(TINY, tp, pp)
    saved = [iteration_directory(Path(folder, name), 7) for name in ("run_dist", "run_torch")]
    if torch.distributed.get_rank() == 0:
        for directory in saved:
            directory.mkdir(parents=True)
            write_tracker(directory.parent, 7)
    torch.distributed.barrier()
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "num_floating_point_operations_so_far": 0}
    dist_checkpointing.save({**content, "model": model.sharded_state_dict()}, str(saved[0]))
    file = rank_file(saved[1], tp_rank, pp_rank, pp)
    file.parent.mkdir()
    states = {
        "optimizer": {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 7},
        "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
    }
    torch.save({**content, "model": model.state_dict(), **states}, file)
    return different


def _load_as_megatron_lm(
    path: Path, model: torch.nn.Module, tp_rank: int, pp_rank: int, parallel: ParallelConfig
) -> None:
    """Format `torch` as Megatron-LM's `--use-checkpoint-args --load` reads it, step by step.

    torch.load with the classes that megatron-core holds for safe; what args must tell, and must agree in; then
    `load_state_dict(strict=True)`.
    """
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    iteration = int((path / "latest_checkpointed_iteration.txt").read_text().strip())
    folder = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "")
    file = path / f"iter_{iteration:07d}" / folder / "model_optim_rng.pt"
    content = torch.load(file, map_location="cpu", weights_only=True)
    assert (content["checkpoint_version"], content["iteration"]) == (3.0, iteration)
    args = content["args"]
    for name, value in _megatron_lm_facts(tp, pp).items():
        assert getattr(args, name) == value, name
    for name in ("optimizer", "rng_state", "opt_param_scheduler"):
        assert name not in content
    assert args.no_save_optim
    assert args.no_save_rng
    model.load_state_dict(content["model"], strict=True)


def _megatron_lm_facts(tp: int, pp: int) -> dict[str, Any]:
    """What Megatron-LM takes over from a checkpoint's args, or compares with its own."""
    return {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 172,
        "seq_length": TINY.max_sequence_length,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "group_query_attention": False,
        "kv_channels": 16,
        "max_position_embeddings": TINY.max_sequence_length,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": 10000,
        "rotary_percent": 0.25,
        "rotary_interleaved": True,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "squared_relu": False,
        "swiglu": True,
        "untie_embeddings_and_output_weights": False,
        "apply_layernorm_1p": False,
        "normalization": "LayerNorm",
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": None,
        "padded_vocab_size": 256,
        "ckpt_format": "torch",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _megatron_lm_args(tp: int, pp: int) -> Namespace:
    """What Megatron-LM itself would record: no word of muP, enums of megatron-core, and a hundred things more."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    return Namespace(
        **_megatron_lm_facts(tp, pp),
        norm_epsilon=1e-5,
        vocab_size=255,
        attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
        params_dtype=torch.float32,
        world_size=tp * pp,
        rampup_batch_size=None,
        lr=1e-3,
    )


@pytest.mark.parametrize(("layouts", "with_foreign_args"), [([(1, 1)], True), ([(1, 4), (2, 2)], False)])
def test_live_models(tmp_path: Path, layouts: list[tuple[int, int]], with_foreign_args: bool) -> None:
    """Planted: the two norms' keys exchanged when torch_dist is written: dist_checkpointing.load fills both wrongly;
    torch_dist written without the linears' extra state: dist_checkpointing.load raises."""
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    convert(hf, tmp_path / "torch", format="torch", tensor_parallel=2, pipeline_parallel=4)
    convert(hf, tmp_path / "torch_dist", format="torch_dist")
    for tp, pp in layouts:
        convert(hf, tmp_path / f"torch_{tp}_{pp}", format="torch", tensor_parallel=tp, pipeline_parallel=pp)
    world_size = layouts[0][0] * layouts[0][1]
    assert run_on_ranks(world_size, _on_each_rank, str(tmp_path), layouts, with_foreign_args) == [[]] * world_size
    for name in ("run_dist", "run_torch"):
        assert_same_tensors(tmp_path / name, weights)
        checkpoint = open_checkpoint(tmp_path / name)
        assert (checkpoint.iteration, checkpoint.mup_recorded) == (7, not with_foreign_args)
        convert(tmp_path / name, tmp_path / f"{name}_hf", format="hf", hf_config=hf if with_foreign_args else None)
        assert_same_tensors(tmp_path / f"{name}_hf", weights)
        assert open_checkpoint(tmp_path / f"{name}_hf").config == TINY
        assert with_foreign_args or not checkpoint.is_converted
