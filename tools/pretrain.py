"""`crystalcoder pretrain`: check the params.yaml, then train in this process or on as many ranks as asked for."""

from __future__ import annotations

import os
import shlex
import sys

from data_prep.errors import InputError
from megatron.crystalcoder.training import launch, pretrain


def main(arguments: list[str]) -> None:
    """The `crystalcoder pretrain` subcommand. Under torchrun every rank runs it, each as one of the job."""
    options, params = pretrain.parse(arguments)  # what is wrong with the file is said before any rank starts
    ranks = options.nproc or options.tp * options.pp
    if "WORLD_SIZE" in os.environ or ranks == 1:
        pretrain.main(arguments)
        return
    if ranks % (options.tp * options.pp):
        raise InputError(
            f"--nproc {ranks} is not a multiple of --tp {options.tp} x --pp {options.pp}: change one of them"
        )
    pretrain.train_config(options, params, ranks)
    command = [
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        "-m",
        "megatron.crystalcoder.training.pretrain",
        *arguments,
    ]
    print(f"$ torchrun {shlex.join(command)}", file=sys.stderr, flush=True)
    launch.main(command)
