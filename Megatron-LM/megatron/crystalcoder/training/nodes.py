"""The command that starts a pretraining job: the launcher's arguments on one machine, the lines to run for several."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

GPUS_PER_NODE = 8
_PROGRAM = ["-m", "megatron.crystalcoder.training.pretrain"]


def one_node(ranks: int, restarts: int, arguments: Sequence[str]) -> list[str]:
    """The launcher's arguments for `ranks` ranks of this machine."""
    start = ["--standalone", "--nproc_per_node", str(ranks), "--max-restarts", str(restarts)]
    return [*start, *_PROGRAM, *for_ranks(arguments)]


def several_nodes(nodes: int, ranks: int, restarts: int, arguments: Sequence[str]) -> str:
    """What to run for `ranks` ranks on each of `nodes` nodes, with Slurm and without; they must see the same files."""
    given = shlex.join(for_ranks(arguments))
    return (
        f"# {nodes} nodes of {ranks} ranks; all is checked, nothing was started. From the checkout, with Slurm:\n"
        f"MAX_RESTARTS={restarts} sbatch --nodes {nodes} --gpus-per-node {ranks} tools/slurm/pretrain.sbatch {given}\n"
        "# or on each node, with its own NODE_RANK from 0, and HOST node 0:\n"
        f"python -m megatron.crystalcoder.training.launch --nnodes {nodes} --node-rank NODE_RANK "
        f"--nproc-per-node {ranks} --master-addr HOST --master-port 29500 --max-restarts {restarts} "
        f"{shlex.join(_PROGRAM)} {given}"
    )


def for_ranks(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that say how many ranks to start (torchrun would take --nproc for its own)."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in ("--nproc", "--nodes", "--max-restarts"):
            skip = not skip and not equals
            continue
        kept.append(argument)
    return kept
