"""`crystalcoder pretrain`: check the params.yaml, then train in this process or on as many ranks as asked for."""

from __future__ import annotations

import os
import shlex
import sys

from data_prep.errors import InputError


def main(arguments: list[str]) -> None:
    """The `crystalcoder pretrain` subcommand: on this machine's ranks, or with `--target CSX` on CS-2 systems."""
    target, others = _split_target(arguments)
    if target is None:
        _train_here(arguments)
        return
    if target != "CSX":
        raise InputError(f"--target {target}: CSX is the only one to name; without --target this machine trains")
    from megatron.crystalcoder.training import csx

    csx.main(others)


def _split_target(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--target`, None without it, and the other arguments."""
    for number, argument in enumerate(arguments):
        if argument == "--target":
            return "".join(arguments[number + 1 : number + 2]), arguments[:number] + arguments[number + 2 :]
        if argument.startswith("--target="):
            return argument.partition("=")[2], arguments[:number] + arguments[number + 1 :]
    return None, arguments


def _train_here(arguments: list[str]) -> None:
    """Under torchrun every rank runs it, each as one of the job."""
    # Seconds of imports that a CS-2 launch does not need.
    from megatron.crystalcoder.training import launch, nodes, pretrain

    options, phases = pretrain.parse(arguments)
    if "WORLD_SIZE" in os.environ:
        pretrain.main(arguments)
        return
    model_parallel = options.tp * options.pp
    ranks = options.nproc or (nodes.GPUS_PER_NODE if options.nodes else model_parallel)
    world_size = ranks * (options.nodes or 1)
    if world_size % model_parallel:
        on_nodes = f" on {options.nodes} nodes" if options.nodes else ""
        raise InputError(
            f"--nproc {ranks}{on_nodes} is not a multiple of --tp {options.tp} x --pp {options.pp}: change one of them"
        )
    pretrain.check_before_start(options, phases, world_size)  # what is wrong is said before any rank starts
    restarts = 3 if options.max_restarts is None else options.max_restarts
    if options.nodes:
        print(nodes.several_nodes(options.nodes, ranks, restarts, arguments))
        return
    os.environ[pretrain.CHECKED] = "1"
    if ranks == 1 and not options.max_restarts:
        pretrain.main(arguments)
        return
    command = nodes.one_node(ranks, restarts, arguments)
    print(f"$ torchrun {shlex.join(command)}", file=sys.stderr, flush=True)
    launch.main(command)
