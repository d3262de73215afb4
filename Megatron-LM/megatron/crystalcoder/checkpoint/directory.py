"""Where things lie in a Megatron checkpoint directory, and how a new directory appears whole or not at all.

SAVE/latest_checkpointed_iteration.txt          the iteration, or the word `release`
SAVE/iter_0000100/mp_rank_TT/model_optim_rng.pt           format `torch`, one pipeline stage
SAVE/iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt       format `torch`, several
SAVE/iter_0000100/{*.distcp, .metadata, common.pt, metadata.json}      format `torch_dist`
SAVE/hf/                                         config.json and tokenizer files that came from Hugging Face
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FILE = "model_optim_rng.pt"
HF_FILES = "hf"
_JOB = "conversion.json"  # in a directory that is being filled: what is being written there


def iteration_directory(save: Path, iteration: int) -> Path:
    """Where one iteration's checkpoint lies."""
    return save / f"iter_{iteration:07d}"


def rank_file(iteration_dir: Path, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """One model-parallel rank's file in format `torch`."""
    folder = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")
    return iteration_dir / folder / RANK_FILE


def read_tracker(save: Path, iteration: int | None = None) -> tuple[int, Path]:
    """The iteration that the tracker names (0 for `release`) and its directory; or another one's. Raises InputError."""
    tracker = save / TRACKER
    if iteration is not None:
        folder = iteration_directory(save, iteration)
        if not folder.is_dir():
            there = ", ".join(str(int(path.name[5:])) for path in sorted(save.glob("iter_*"))) or "none"
            raise InputError(f"{folder}: there is no such checkpoint: choose an iteration that is there ({there})")
        return iteration, folder
    try:
        text = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{tracker}: no such file, and no config.json beside it: {save} is neither a Megatron nor a Hugging Face "
            "checkpoint, give the directory that holds one of the two files"
        ) from error
    if text == RELEASE:
        iteration, folder = 0, save / RELEASE
    elif text.isdecimal():
        iteration, folder = int(text), iteration_directory(save, int(text))
    else:
        raise InputError(f"{tracker}: holds {text[:40]!r} instead of an iteration number or `{RELEASE}`")
    if not folder.is_dir():
        raise InputError(f"{tracker}: names {folder.name}, which is not there: copy it, or correct the number")
    return iteration, folder


def write_tracker(save: Path, iteration: int | str) -> None:
    """Make this iteration (or `release`) the latest, atomically: a reader sees the old number or the new one."""
    partial = save / f".{TRACKER}.{os.getpid()}"
    partial.write_text(str(iteration))
    os.replace(partial, save / TRACKER)


class Interrupted(InputError):
    """What stopped the work is not in the input (a lost connection): the same job can go on from here."""


@dataclass
class PartialDirectory:
    """A directory on its way to becoming a target. is_laid_out: the same job, interrupted, has made its files."""

    path: Path
    job: dict[str, Any]
    is_laid_out: bool

    def laid_out(self) -> None:
        """Say that all files are there at full size: from here on the same job can go on after an interruption."""
        partial = self.path / f"{_JOB}.new"
        partial.write_text(json.dumps(self.job))
        os.replace(partial, self.path / _JOB)


@contextmanager
def new_directory(target: Path, *, overwrite: bool, job: dict[str, Any]) -> Iterator[PartialDirectory]:
    """Yield a directory to fill; it becomes `target` by rename when the block ends, and vanishes when it raises.

    A process that is killed or interrupted (also by `Interrupted`) leaves it behind, and the next with the same `job`
    (what is written, from what; anything that JSON holds) goes on with it; another job starts anew.

    Raises InputError when the target exists, unless it is an empty directory or `overwrite` is set (then the old one is
    removed only once the new one is complete), and when another process is at work on it.
    """
    target = target.absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise InputError(f"{target}: exists already: choose another target or pass --overwrite")
    missing = [parent for parent in target.parents if not parent.exists()]
    path = target.parent / f".{target.name}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be made ({error.strerror}): choose another target") from error
    with _locked(path, target):
        job = json.loads(json.dumps(job))
        is_laid_out = (path / _JOB).is_file() and _read_job(path / _JOB) == job
        if not is_laid_out:
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield PartialDirectory(path, job, is_laid_out)
            (path / _JOB).unlink()
            replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
            if target.exists():
                os.replace(target, replaced)
            os.replace(path, target)
            shutil.rmtree(replaced, ignore_errors=True)
        except Interrupted:
            if not (path / _JOB).is_file():
                shutil.rmtree(path, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)
            for parent in missing:  # innermost first; one that somebody else uses by now stays
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise InputError(
                    f"{target}: the disk is full ({error.strerror}): make room, or choose another"
                ) from error
            raise
        except KeyboardInterrupt:
            if (path / _JOB).is_file():
                raise InputError(
                    f"{target}: interrupted: the same command goes on from here; to give it up, delete {path}"
                ) from None
            shutil.rmtree(path, ignore_errors=True)
            raise


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Keep other processes out; the lock goes with the process, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{target}: another process is writing it: wait for it, or choose another target") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)


def _read_job(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
