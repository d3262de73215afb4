"""Where things lie in a Megatron checkpoint directory, and how a new directory appears whole or not at all.

SAVE/latest_checkpointed_iteration.txt          the iteration, or the word `release`
SAVE/iter_0000100/mp_rank_TT/model_optim_rng.pt           format `torch`, one pipeline stage
SAVE/iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt       format `torch`, several
SAVE/iter_0000100/{*.distcp, .metadata, common.pt, metadata.json}      format `torch_dist`
SAVE/hf/                                         config.json and tokenizer files that came from Hugging Face
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import InputError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FILE = "model_optim_rng.pt"
HF_FILES = "hf"


def iteration_directory(save: Path, iteration: int) -> Path:
    """Where one iteration's checkpoint lies."""
    return save / f"iter_{iteration:07d}"


def rank_file(iteration_dir: Path, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """One model-parallel rank's file in format `torch`."""
    folder = f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")
    return iteration_dir / folder / RANK_FILE


def read_tracker(save: Path) -> tuple[int, Path]:
    """The iteration that the tracker names (0 for `release`) and its directory. Raises InputError."""
    tracker = save / TRACKER
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


def write_tracker(save: Path, iteration: int) -> None:
    """Make this iteration the latest, atomically: a reader sees the old number or the new one."""
    partial = save / f".{TRACKER}.{os.getpid()}"
    partial.write_text(str(iteration))
    os.replace(partial, save / TRACKER)


@contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a directory to fill; it becomes `target` by rename when the block ends, and vanishes when it raises.

    Raises InputError when the target exists, unless it is an empty directory or `overwrite` is set; then the old one is
    removed only once the new one is complete.
    """
    target = target.absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise InputError(f"{target}: exists already: choose another target or pass --overwrite")
    missing = [parent for parent in target.parents if not parent.exists()]
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:  # innermost first; one that somebody else uses by now stays
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
