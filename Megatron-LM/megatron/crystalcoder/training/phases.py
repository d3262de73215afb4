"""Phases of pretraining: which params.yaml each has, where it begins and ends up, and that they come in their order.

Phase n begins with the weights, and nothing else, of the last checkpoint of phase n-1: step, schedule, data position
and Adam's moments start anew. A checkpoint records its phase, so that one given to the wrong phase is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.directory import TRACKER, read_tracker
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.training.params import THE_SOUND_WAY, Params, ReferenceCompat, load_params
from megatron.crystalcoder.training.resume import has_checkpoint


@dataclass(frozen=True)
class Phase:
    """One run: its file; its number, if it is known to be one of several phases; where its checkpoints go; and whose
    weights it begins with (None: new ones)."""

    params: Params
    number: int | None
    model_dir: Path
    checkpoint_path: Path | None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"phase {self.number}" if self.number else str(self.params.file.path)

    @property
    def steps_done(self) -> int | None:
        """The iteration of its last checkpoint; None if there is none."""
        return read_tracker(self.model_dir)[0] if (self.model_dir / TRACKER).is_file() else None

    @property
    def is_finished(self) -> bool:
        """Whether its last checkpoint is that of its last step."""
        return (self.steps_done or 0) >= self.params.values.runconfig.max_steps


def one_phase(
    path: Path,
    overrides: Iterable[str] = (),
    reference: ReferenceCompat = THE_SOUND_WAY,
    *,
    model_dir: Path | None = None,
    checkpoint_path: Path | None = None,
) -> Phase:
    """The run of one file. Its number is that in the name of the file, or else of the directory that holds it."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory: give one file, or --phases 1,2,3 to run those in it")
    params = load_params(path, overrides, reference)
    run = params.values.runconfig
    return Phase(
        params,
        phase_number(path),
        model_dir or Path(run.model_dir or "model_dir"),
        checkpoint_path or (Path(run.checkpoint_path) if run.checkpoint_path else None),
    )


def several_phases(
    numbers: str,
    source: Path,
    overrides: Iterable[str] = (),
    reference: ReferenceCompat = THE_SOUND_WAY,
    *,
    model_dir: Path | None = None,
    checkpoint_path: Path | None = None,
) -> list[Phase]:
    """The phases `numbers` (like `1,2,3`), each beginning with the weights of the one before.

    source: a directory with phase1.yaml or phase1/params.yaml and so on, or a path with `{n}` for the number.
    model_dir: phase n's checkpoints go to model_dir/phase<n>; without it, to each file's runconfig.model_dir.
    checkpoint_path: what the first one begins with; without it, phase n-1's directory beside its own, or its file's.
    """
    overrides, phases = list(overrides), list[Phase]()
    for number in _parse_numbers(numbers):
        path = _file_of(source, number)
        phase = one_phase(path, overrides, reference, model_dir=model_dir and model_dir / f"phase{number}")
        before = model_dir / f"phase{number - 1}" if model_dir else None
        if phases:
            start: Path | None = phases[-1].model_dir
        elif checkpoint_path is None and before is not None and has_checkpoint(before):
            start = before
        else:
            start = checkpoint_path or phase.checkpoint_path
        phases.append(replace(phase, number=number, checkpoint_path=start))
    for first, second in pairwise(phases):
        if first.model_dir == second.model_dir:
            raise InputError(
                f"{second.params.file.place(('runconfig', 'model_dir'))}: runconfig.model_dir {second.model_dir} is "
                f"{first.name}'s too: give each its own, or --model_dir for all"
            )
    return phases


def check_order(phases: Sequence[Phase]) -> None:
    """Raise InputError when a phase would begin with other weights than those of the finished phase before it."""
    for first, second in pairwise(phases):
        if second.steps_done is not None and not first.is_finished:
            raise InputError(
                f"{second.model_dir}: {second.name} has begun, but {first.name} in {first.model_dir} stands at step "
                f"{first.steps_done or 0} of {first.params.values.runconfig.max_steps}: remove {second.model_dir}, or "
                f"leave {first.name} as it was"
            )
    first = phases[0]
    if first.steps_done is not None:
        return  # it goes on with its own weights
    if first.checkpoint_path is None:
        _refuse_new_weights(first)
    elif first.number is not None and has_checkpoint(first.checkpoint_path):
        _refuse_other_phase(first, first.number, first.checkpoint_path)


def _refuse_new_weights(phase: Phase) -> None:
    keys = ("runconfig", "is_pretrained_checkpoint")
    if phase.params.values.runconfig.is_pretrained_checkpoint:
        before = f"phase {phase.number - 1}'s" if phase.number and phase.number > 1 else "a"
        raise InputError(
            f"{phase.params.file.place(keys)}: {'.'.join(keys)} True needs the weights to begin with: give {before} "
            "checkpoint as --checkpoint_path, or set it False for new weights"
        )


def _refuse_other_phase(phase: Phase, number: int, path: Path) -> None:
    """Of a checkpoint that tells no phase (converted, Hugging Face, another trainer's) nothing is known to be wrong."""
    args = open_checkpoint(path).args
    theirs = getattr(args, "phase", None)
    if theirs is None:
        return
    remedy = "; to begin with it all the same, convert it (crystalcoder convert) and give the result"
    if theirs != number - 1:
        expected = f"phase {number - 1}'s last checkpoint" if number > 1 else "new weights"
        raise InputError(f"{path}: is of phase {theirs}, but phase {number} begins with {expected}: give that{remedy}")
    done, planned = vars(args)["iteration"], vars(args)["train_iters"]
    if done < planned:
        raise InputError(
            f"{path}: phase {theirs} stands at step {done} of {planned}: run the same command again to finish it"
            f"{remedy}"
        )


def phase_number(path: Path) -> int | None:
    """2 for phase2.yaml and phase2/params.yaml; None for a name without a phase."""
    for name in (path.stem, path.absolute().parent.name):
        if found := re.fullmatch(r"phase[_-]?(\d+)", name):
            return int(found[1])
    return None


def _parse_numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise InputError(f"--phases {text}: give the numbers of phases with commas between, as 1,2,3")
    numbers = [int(word) for word in words]
    for before, after in pairwise(numbers):
        if after != before + 1:
            raise InputError(
                f"--phases {text}: phase {after} begins with the weights of phase {after - 1}, not of phase {before}: "
                "name them in order and leave none out, as 1,2,3"
            )
    return numbers


def _file_of(source: Path, number: int) -> Path:
    if "{n}" in str(source):
        return Path(str(source).replace("{n}", str(number)))
    found = [source / f"phase{number}.yaml", source / f"phase{number}" / "params.yaml"]
    for path in found:
        if path.is_file():
            return path
    if source.is_dir():
        raise InputError(f"{source}: holds neither {found[0].name} nor phase{number}/params.yaml: add one of them")
    raise InputError(
        f"--params {source}: with --phases give the directory that holds phase{number}.yaml or "
        f"phase{number}/params.yaml, or a path with {{n}} for the number"
    )
