"""A run's state on disk: weights, optimizer, random state, progress.

    <save>/iter_0000100/                             a checkpoint, in one of two formats
    <save>/latest_checkpointed_iteration.txt         its iteration: written last, so it never names an unfinished one

`torch_dist` is megatron-core's distributed checkpoint: any TP, PP and DP resumes from it. `torch` is one
`mp_rank_*/model_optim_rng.pt` per model-parallel rank (and `distrib_optim.pt`, the distributed optimizer's moments):
any TP and PP reads its weights, only the same resumes. All ranks write into one directory: nodes share a file system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import iteration_directory, rank_file, write_tracker
from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION, to_args
from megatron.crystalcoder.sigterm import helpers_outlive_sigterm
from megatron.crystalcoder.training.accounting import Accounting
from megatron.crystalcoder.training.compact_adam import whole_moments
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.lora import record_adapter, save_adapter, trained_state
from megatron.crystalcoder.training.optimizer import restore_settings
from megatron.crystalcoder.training.resume import Progress, Start

DISTRIBUTED_OPTIMIZER_FILE = "distrib_optim.pt"
# Optimizer state is stored per parameter and whole, whatever shards held it: loadable at any TP, PP and DP. It is
# gathered in the host's memory of data-parallel rank 0. megatron-core's usual way gathers all of it on every rank: of
# the 7B model, 26 GB at a time on the GPU and 79 GB in the host's memory.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def save_run(
    config: TrainConfig,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    progress: Progress,
    account: Accounting,
) -> None:
    """Write <save>/iter_<iteration> under another name, rename it when it is whole, then move the tracker."""
    assert config.save is not None
    folder = iteration_directory(config.save, progress.iteration)
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state: dict[str, Any] = {
        "args": _facts(config, progress, account),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": progress.iteration,
    }
    with whole_moments(optimizer), helpers_outlive_sigterm():
        if config.save_format == "torch_dist":
            if config.lora is not None:
                record_adapter(state["args"], model.module.lora)
            _save_torch_dist(partial, state, model, optimizer)
            if config.lora is not None:  # behind the rest: megatron-core takes a folder with files for a corrupted one
                save_adapter(partial, model.module.lora)
        else:
            _save_torch(_rank_file(partial), state, model, optimizer)
    dist.barrier()
    if dist.get_rank() == 0:
        replaced = folder.with_name(f".{folder.name}.replaced")
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(partial, folder)
        write_tracker(config.save, progress.iteration)
        shutil.rmtree(replaced, ignore_errors=True)
    dist.barrier()


def load_run(start: Start, config: TrainConfig, model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Restore what `start` asks for beyond the weights, which the model has already."""
    if start.checkpoint is None:
        return
    folder = iteration_directory(start.checkpoint.path, start.checkpoint.iteration)
    with whole_moments(optimizer):
        if start.checkpoint.format == "torch_dist":
            _load_torch_dist(folder, start, model, optimizer)
        else:
            _load_torch(_rank_file(folder), start, optimizer)
    restore_settings(optimizer, config.optimizer)


def _facts(config: TrainConfig, progress: Progress, account: Accounting) -> argparse.Namespace:
    """The checkpoint's `args`: the model, and what resuming needs to know of the run, under Megatron-LM's names."""
    return to_args(
        config.model,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        iteration=progress.iteration,
        consumed_train_samples=progress.consumed_samples,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        train_iters=config.train_iters,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        phase=config.phase,
        run_config=json.dumps(asdict(config), default=_plain),
        code_version=code_version(),
        **account.record(progress.consumed_samples),
    )


def _plain(value: Any) -> Any:
    """What JSON has no form for; the same on every rank, where a set's own order is not."""
    return sorted(value) if isinstance(value, frozenset) else str(value)


@lru_cache(maxsize=1)
def code_version() -> str:
    """The kit's version and, in a git checkout, its commit, with a + where files differ from that."""
    here = Path(__file__)
    try:
        text = version("crystalcoder")
    except PackageNotFoundError:
        text = "unknown"
    if shutil.which("git") is None:
        return text
    # A kit that is installed inside another project's checkout must not take that one's commit for its own.
    for command in (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
    ):
        told = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, check=False)
        if told.returncode:
            return text
    return f"{text} {told.stdout.strip()}"


def _save_torch_dist(folder: Path, state: dict[str, Any], model: Any, optimizer: Any) -> None:
    sharded = trained_state(model.module)
    state["model"] = sharded
    with _indices_without_padding(optimizer):
        state["optimizer"] = optimizer.sharded_state_dict(sharded, metadata=_SHARDING)
    state["rng_state"] = _sharded_rng(_rng())
    dist_checkpointing.save(state, str(folder), content_metadata=_SHARDING)


@contextmanager
def _indices_without_padding(optimizer: Any) -> Iterator[None]:
    """Have the distributed optimizer's buffers say where parameters lie without the padding behind each bucket.

    megatron-core 0.16 gathers a buffer's state without that padding, and then cuts it at the places with it: from the
    second bucket on (they come with --overlap-grad-reduce) each parameter would get its neighbour's numbers.
    """
    buffers = [buffer for single in optimizer.chained_optimizers for buffer in getattr(single, "buffers", [])]
    indices = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = [0, *accumulate(padding)]
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index in zip(buffers, indices, strict=True):
            buffer.param_index_map = index


def _load_torch_dist(folder: Path, start: Start, model: Any, optimizer: Any) -> None:
    wanted: dict[str, Any] = {}
    if start.load_optimizer:
        sharded = trained_state(model.module)
        wanted["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=_SHARDING)
    if start.load_rng:
        wanted["rng_state"] = _sharded_rng(None)
    if not wanted:
        return
    state = dist_checkpointing.load(wanted, str(folder))
    if start.load_optimizer:
        optimizer.load_state_dict(state["optimizer"])
    if start.load_rng:
        _set_rng(state["rng_state"])


def _save_torch(file: Path, state: dict[str, Any], model: Any, optimizer: Any) -> None:
    """Data-parallel rank 0 of each model-parallel rank writes; the others take part in gathering their moments."""
    if parallel_state.get_data_parallel_rank() == 0:
        file.parent.mkdir()
        state["model"] = {name: x for name, x in model.module.state_dict().items() if isinstance(x, torch.Tensor)}
        state["optimizer"] = optimizer.state_dict()
        if masters := state["optimizer"].get("fp32_from_fp16_params"):
            # Without megatron-core's attributes, whose pickle is more than tensors and would be refused on reading.
            state["optimizer"]["fp32_from_fp16_params"] = [[x.detach() for x in group] for group in masters]
        state["rng_state"] = _rng()
        torch.save(state, file)
    if state["args"].use_distributed_optimizer:
        optimizer.save_parameter_state(str(file.with_name(DISTRIBUTED_OPTIMIZER_FILE)))


@torch.no_grad()  # megatron-core copies the moments' fp32 weights into views of live parameters
def _load_torch(file: Path, start: Start, optimizer: Any) -> None:
    state = safe_load.load(file)
    if start.load_optimizer:
        optimizer.load_state_dict(state["optimizer"])
        if file.with_name(DISTRIBUTED_OPTIMIZER_FILE).is_file():
            optimizer.load_parameter_state(str(file.with_name(DISTRIBUTED_OPTIMIZER_FILE)))
    if start.load_rng:
        _set_rng(state["rng_state"])


def _rank_file(iteration_dir: Path) -> Path:
    return rank_file(
        iteration_dir,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def _rng() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if platform.is_cuda() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != platform.is_cuda():
        return  # saved on a GPU and resumed on a CPU, or the reverse: the generators are of another kind
    if platform.is_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    """One random state per (pipeline, tensor) rank; data-parallel ranks hold replicas of it."""
    return ShardedObject(
        "rng_state",
        state,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(),
    )
