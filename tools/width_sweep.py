"""What `coord-check` and `mutransfer` share: their arguments, the ranks they run on, and where results go."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.params import Params, load_params


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def parser(name: str, description: str, *, widths: str, steps: int, batch_size: int) -> argparse.ArgumentParser:
    """The arguments of both commands."""
    top = _Parser(prog=f"crystalcoder {name}", description=description, allow_abbrev=False)
    top.add_argument("--params", type=Path, required=True, help="the YAML file: params/tiny/phase1.yaml, ...")
    top.add_argument("--data_root", "--data-root", type=Path, help="what relative data directories are relative to")
    top.add_argument("--widths", type=numbers(int), default=numbers(int)(widths), help=f"default: {widths}")
    top.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of each model; default: {steps}")
    top.add_argument("--seeds", type=int, default=1, help="models of each kind, whose results are averaged; default: 1")
    top.add_argument("--batch-size", type=int, default=batch_size, help=f"sequences a step; default: {batch_size}")
    top.add_argument("--out", type=Path, required=True, help=f"{name}.png and {name}.json are written here")
    top.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    top.add_argument("--pp", type=int, default=1, help="pipeline stages")
    top.add_argument("overrides", nargs="*", metavar="key.path=value", help="put in place of the file's values")
    return top


def numbers(kind: Any) -> Any:
    """A type for argparse: rising numbers, separated by commas."""

    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(0 < value < float("inf") for value in values) or values != sorted(set(values)):
            raise argparse.ArgumentTypeError(f"'{text}': write rising numbers above 0, as in 64,128,256")
        return values

    return parse


def read(options: argparse.Namespace) -> tuple[Params, TrainConfig]:
    """The file, and the run that the arguments make of it. Raises InputError on anything wrong."""
    for name in ("steps", "seeds", "batch_size", "tp", "pp"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if len(options.widths) < 2:
        raise InputError(f"--widths {options.widths[0]}: a comparison needs two at least")
    if any(each.exists() and not each.is_dir() for each in (options.out, *options.out.parents)):
        raise InputError(f"{options.out}: is not a directory: choose another --out")  # not after hours of training
    params = load_params(options.params, options.overrides)
    config = params.train_config(
        parallel=ParallelConfig(options.tp, options.pp, sequence_parallel=options.tp > 1), data_root=options.data_root
    )
    data = replace(config.data, num_workers=0)
    return params, replace(
        config, data=data, global_batch_size=options.batch_size, micro_batch_size=options.batch_size, bf16=False
    )


def on_ranks(module: str, options: argparse.Namespace, arguments: list[str]) -> bool:
    """Start `module` on TP x PP ranks if that takes more than this process; whether that was done."""
    ranks = options.tp * options.pp
    if ranks == 1 or "WORLD_SIZE" in os.environ:
        return False
    from megatron.crystalcoder.training import launch

    launch.main(["--standalone", "--nproc_per_node", str(ranks), "-m", module, *arguments])
    return True


def write(out: Path, name: str, results: Any, figure: Any) -> None:
    """`<name>.json` and `<name>.png` in `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        figure.savefig(out / f"{name}.png", dpi=110)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}): choose another --out") from None
