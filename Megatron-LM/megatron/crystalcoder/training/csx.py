"""The same params.yaml on a CS-2: what `crystalcoder pretrain --target CSX` runs.

CS-2 systems are driven by modelzoo, the vendor's own repository, which is not part of this kit. The file needs no
translation, so all there is to do is to check it, to build modelzoo's command line and to start it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_prep.errors import InputError, exit_on_bad_input
from megatron.crystalcoder.training.params import Params, load_params
from megatron.crystalcoder.training.params_schema import Input

RUN_SCRIPT = Path("modelzoo/transformers/pytorch/gpt3/run.py")
# As many as the reference run had: phase 3's file does not say.
_SYSTEMS = 16


@dataclass(frozen=True)
class Launch:
    """A command, and what this machine lacks to run it: one phrase each, none when it can start."""

    command: list[str]
    missing: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--target CSX --help lists the arguments)")


def parser() -> argparse.ArgumentParser:
    """The arguments; what is not given comes from the file's runconfig."""
    top = _Parser(
        prog="crystalcoder pretrain --target CSX",
        description="Pretrain from a params.yaml on CS-2 systems, through modelzoo.",
        allow_abbrev=False,
    )
    top.add_argument("--params", type=Path, required=True, help="the YAML file: params/phase1/params.yaml, ...")
    top.add_argument("--release", choices=("1.9", "2.0"), default="1.9", help="release of modelzoo; default: 1.9")
    top.add_argument(
        "--modelzoo", type=Path, help=f"modelzoo's checkout: it holds {RUN_SCRIPT}; default: the current directory"
    )
    top.add_argument(
        "--python_paths", "--python-paths", nargs="+", metavar="DIR", help="where modelzoo lies; default: --modelzoo"
    )
    top.add_argument(
        "--mount_dirs", "--mount-dirs", nargs="+", metavar="DIR", help="directories that the cluster must see"
    )
    top.add_argument("--model_dir", "--model-dir", type=Path, help="checkpoints and logs go here")
    top.add_argument("--checkpoint_path", "--checkpoint-path", type=Path, help="modelzoo's checkpoint to begin with")
    top.add_argument("--mode", choices=("train", "eval", "train_and_eval"), help="default: runconfig.mode")
    top.add_argument("--num_csx", "--num-csx", type=int, help=f"systems; without it or runconfig.num_csx, {_SYSTEMS}")
    top.add_argument(
        "--num_workers_per_csx", "--num-workers-per-csx", type=int, help="data workers per system; release 1.9 only"
    )
    top.add_argument("--dry-run", action="store_true", help="print the command and what is missing; run nothing")
    return top


def main(arguments: Sequence[str]) -> None:
    """Print the command, then run it and exit as it did. Exit code 2 when something it needs is missing."""
    with exit_on_bad_input():
        options, unknown = parser().parse_known_args(arguments)
        if unknown and "=" in unknown[0] and not unknown[0].startswith("-"):
            raise InputError(f"{unknown[0]}: overrides do not reach modelzoo, which reads the file: change it there")
        if unknown:
            parser().error(f"unrecognized arguments: {' '.join(unknown)}")
        launch = build(options, load_params(options.params))
        print(shlex.join(launch.command), flush=True)
        if options.dry_run:
            for phrase in launch.missing:
                print(f"missing: {phrase}", file=sys.stderr)
            return
        if launch.missing:
            raise InputError(f"not started: {'; '.join(launch.missing)}")
        raise SystemExit(subprocess.run(launch.command, check=False).returncode)


def build(options: argparse.Namespace, params: Params) -> Launch:
    """modelzoo's command for this file. Raises InputError when a path that the user or the file names is wrong."""
    run, missing = params.values.runconfig, []
    place = params.file.place

    def setting(name: str, default: object) -> tuple[object, str]:
        """The flag's value, or else the file's, or else `default`; and what to call it in an error."""
        flag = getattr(options, name)
        if flag is not None:
            return flag, f"--{name}"
        return getattr(run, name) or default, f"{place(('runconfig', name))}: {name}"

    for name in ("num_csx", "num_workers_per_csx"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if options.release != "1.9" and options.num_workers_per_csx is not None:
        raise InputError("--num_workers_per_csx is an option of release 1.9 only: drop it, or give --release 1.9")

    root = options.modelzoo or Path()
    if not (root / RUN_SCRIPT).is_file():
        if options.modelzoo is not None:
            raise InputError(f"--modelzoo {root}: has no {RUN_SCRIPT}: give modelzoo's checkout")
        missing.append(f"modelzoo: {RUN_SCRIPT} is not here, give its checkout as --modelzoo")
    if shutil.which("python") is None:
        missing.append("python: there is no such command on PATH, activate modelzoo's environment")

    command = ["python", str(root / RUN_SCRIPT), "CSX", "--mode", options.mode or run.mode]
    command += ["--num_csx", str(setting("num_csx", _SYSTEMS)[0])]
    if options.release == "1.9":
        command += ["--num_workers_per_csx", str(setting("num_workers_per_csx", 1)[0])]
    command += ["--params", str(options.params)]

    for name, default, what in (
        ("python_paths", [str(root.resolve())] if options.modelzoo else [], "where modelzoo lies"),
        ("mount_dirs", [], "the directories that the cluster must see"),
    ):
        paths, said = setting(name, default)
        assert isinstance(paths, list)
        for path in paths:
            _require(Path(path), said, directory=True)
        if not paths:
            missing.append(f"{name}: name {what}, by --{name} or in {place(('runconfig', name))}")
        # A name in capitals keeps the line whole for whoever fills it in elsewhere.
        command += [f"--{name}", *(paths or [name.upper()])]

    model_dir, said = setting("model_dir", "model_dir")
    if Path(str(model_dir)).is_file():
        raise InputError(f"{said} {model_dir}: is a file: name a directory")
    command += ["--model_dir", str(model_dir)]
    checkpoint, said = setting("checkpoint_path", None)
    if checkpoint is not None:
        _require(Path(str(checkpoint)), said, directory=False)
        command += ["--checkpoint_path", str(checkpoint)]
    return Launch(command, missing + _missing_data(params, options.mode or run.mode))


def _require(path: Path, said: str, *, directory: bool) -> None:
    if not (path.is_dir() if directory else path.exists()):
        raise InputError(f"{said} {path}: there is no such {'directory' if directory else 'file'}: correct the path")


def _missing_data(params: Params, mode: str) -> list[str]:
    """The first data directory that is not there, and how many more; modelzoo would meet it after minutes of set-up."""
    sections: list[tuple[str, Input | None]] = []
    if mode != "eval":
        sections.append(("train_input", params.values.train_input))
    if mode != "train":
        sections.append(("eval_input", params.values.eval_input))
    absent = []
    for name, source in sections:
        for number, item in enumerate((source and source.mixture) or ()):
            if item.weight and not Path(item.data_dir).is_dir():
                absent.append((item.data_dir, params.file.place((name, "mixture", number, "data_dir"))))
        for data_dir in (source and source.data_dir) or ():
            if not Path(data_dir).is_dir():
                absent.append((data_dir, params.file.place((name, "data_dir"))))
    if not absent:
        return []
    more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
    return [f"data: {absent[0][1]}: there is no directory {absent[0][0]}{more}, fill in yours"]
