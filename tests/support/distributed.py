"""Run a function on N gloo ranks, as torchrun would start them, and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

# Ranks are forked from a server that has imported these once: 7 s saved per rank and test.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.checkpoint", "megatron.core.models.gpt", "megatron.core.dist_checkpointing"]
)


def _run_rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from megatron.crystalcoder import platform

    try:
        platform.initialize(init_method=f"file://{folder}/rendezvous")
        torch.save(function(*args), f"{folder}/result_{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        Path(f"{folder}/error_{rank}").write_text(traceback.format_exc())
        raise


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes joined in one process group; return the results by rank.

    The function must be importable (module level). It runs with the process group initialised but without megatron's
    parallel state: it calls `platform.initialize_model_parallel` itself, as often as it wants other layouts.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.start_processes(
                _run_rank, (world_size, folder, function, args), nprocs=world_size, start_method="forkserver"
            )
        except torch.multiprocessing.ProcessRaisedException:
            errors = sorted(Path(folder).glob("error_*"))
            raise AssertionError("\n".join(f"{e.name}: {e.read_text()}" for e in errors)) from None
        return [torch.load(f"{folder}/result_{rank}.pt", weights_only=False) for rank in range(world_size)]
