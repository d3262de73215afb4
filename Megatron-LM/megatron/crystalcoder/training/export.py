"""Hugging Face exports of a run's checkpoints while it goes on, each made by a process of its own.

A conversion takes no part of the training process: it runs at low priority and without a GPU, one at a time; that one
fails is told and written down, and training goes on. SAVE/exports/iter_<n> appears when it is whole;
SAVE/exports/exports.json lists what was made and what failed. What is missing is made when the run is started again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.errors import exit_on_bad_input
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.directory import TRACKER, read_tracker
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.training.config import TrainConfig

EXPORTS = "exports"
LIST_FILE = "exports.json"


class Exporter:
    """Exports every `every`-th checkpoint of the runs it follows, and their last; `tokenizer`: what `convert` takes.

    For rank 0.
    """

    def __init__(self, every: int, tokenizer: Path | None = None) -> None:
        self._every, self._tokenizer = every, tokenizer
        self._queue = ThreadPoolExecutor(max_workers=1)
        self._child: subprocess.Popen[str] | None = None
        self._queued = set[Path]()
        self._stopped = False

    def follow(self, config: TrainConfig) -> None:
        """Queue the exports that are due and not there of all the checkpoints that a run has by now."""
        assert config.save is not None
        if not (config.save / TRACKER).is_file():
            return
        last, _ = read_tracker(config.save)
        for folder in sorted(config.save.glob("iter_*")):
            iteration = int(folder.name.removeprefix("iter_"))
            target = config.save / EXPORTS / folder.name
            if iteration <= last and self._is_due(config, iteration) and target not in self._queued | _existing(target):
                self._queued.add(target)
                self._queue.submit(self._export, config.save, iteration, target)

    def wait(self) -> None:
        """Return when all exports are made, or have failed."""
        if self._child is not None:
            print("waiting for the exports that are under way", flush=True)
        self._queue.shutdown(wait=True)

    def stop(self) -> None:
        """Give up those under way."""
        self._stopped = True
        if self._child is not None:
            self._child.terminate()
        self._queue.shutdown(wait=True, cancel_futures=True)

    def _is_due(self, config: TrainConfig, iteration: int) -> bool:
        step = self._every * config.save_interval
        return iteration == config.train_iters or (step > 0 and iteration % step == 0)

    def _export(self, save: Path, iteration: int, target: Path) -> None:
        if self._stopped:
            return
        command = [sys.executable, "-m", __name__, str(save), str(iteration), str(target)]
        command += [str(self._tokenizer)] if self._tokenizer else []
        # One process, no rank of the job, and without the GPUs that the ranks use.
        environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = self._child.communicate()
        failed, self._child = self._child.returncode, None
        if self._stopped or failed == -signal.SIGTERM:  # the run is being ended, and this with it
            return
        entry: dict[str, Any] = {"iteration": iteration}
        if failed:
            reason = (said.strip().splitlines() or [f"exit code {failed}"])[-1].removeprefix("error: ")
            entry["error"] = reason
            print(f"export of iteration {iteration} failed, training goes on: {reason}", file=sys.stderr, flush=True)
        else:
            entry |= {"directory": str(target), **json.loads((target / "training.json").read_text())}
            print(f"exported iteration {iteration} to {target}", flush=True)
        _list(target.parent, entry)


def export(save: Path, iteration: int, target: Path, tokenizer: Path | None = None) -> None:
    """Write one checkpoint of a run as a Hugging Face directory, which appears when it is whole.

    training.json in it tells how far training was. Raises InputError.
    """
    partial = target.with_name(f".{target.name}.export")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        convert(
            save,
            partial,
            format="hf",
            iteration=iteration,
            tokenizer=tokenizer,
            logits=False,
            workers=1,
            report=lambda line: None,
        )
        (partial / "training.json").write_text(json.dumps(_facts(save, iteration), indent=2) + "\n")
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _facts(save: Path, iteration: int) -> dict[str, Any]:
    args = vars(open_checkpoint(save, iteration=iteration).args)
    samples, length = args["consumed_train_samples"], args["seq_length"]
    return {
        "iteration": iteration,
        "phase": args.get("phase"),
        "consumed_tokens": samples * length,
        "code_version": args["code_version"],
    }


def _existing(target: Path) -> set[Path]:
    return {target} if target.is_dir() else set()


def _list(folder: Path, entry: dict[str, Any]) -> None:
    """Put `entry` in the list, in place of an earlier one of its iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LIST_FILE
    entries = json.loads(path.read_text()) if path.is_file() else []
    entries = [each for each in entries if each["iteration"] != entry["iteration"]] + [entry]
    partial = folder / f".{LIST_FILE}.partial"
    partial.write_text(json.dumps(sorted(entries, key=lambda each: each["iteration"]), indent=2) + "\n")
    os.replace(partial, path)


def main() -> None:
    """The process behind one export."""
    with exit_on_bad_input():
        os.nice(10)
        save, iteration, target, *tokenizer = sys.argv[1:]
        export(Path(save), int(iteration), Path(target), Path(tokenizer[0]) if tokenizer else None)


if __name__ == "__main__":
    main()
