"""phases.json: of every phase and dataset, the tokens that were planned and those that were consumed.

It stands in each phase's directory, and tells of the phases before, too, as far as their directories had one. Several
phases run by one command also have it in the directory above, with those that are still to come.

    {"phases": [{"phase": 1, "params": "params/tiny/phase1.yaml", "model_dir": "runs/tiny/phase1",
                 "steps": {"planned": 400, "consumed": 400}, "tokens": {"planned": 819200, "consumed": 819200},
                 "datasets": {"data/prose": {"planned": 655360, "consumed": 655360}, ...}}, ...],
     "tokens": {"planned": ..., "consumed": ...}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.crystalcoder.training.accounting import Accounting
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.phases import Phase
from megatron.crystalcoder.training.resume import Progress

PHASES_FILE = "phases.json"
Entry = dict[str, Any]


class PhaseReport:
    """Keeps phases.json, and tells the same in a line, each time that a phase has saved. For rank 0."""

    def __init__(
        self,
        phase: Phase,
        config: TrainConfig,
        *,
        later: Sequence[tuple[Phase, TrainConfig]] = (),
        summary: Path | None = None,
    ) -> None:
        """later: the phases to come; summary: the directory of the file that tells of them too."""
        self._phase, self._config, self._summary = phase, config, summary
        self._earlier = read_phases(phase.checkpoint_path) if phase.checkpoint_path else []
        self._later = [_entry(each, its_config, {}, {}, 0) for each, its_config in later]

    def __call__(self, progress: Progress, account: Accounting) -> None:
        """Take in how far the phase is."""
        config = self._config
        planned = account.drawn(
            progress.consumed_samples + (config.train_iters - progress.iteration) * config.global_batch_size
        )
        consumed = account.drawn(progress.consumed_samples)
        entry = _entry(self._phase, config, planned, consumed, progress.iteration)
        _write(self._phase.model_dir, [*self._earlier, entry])
        if self._summary is not None:
            _write(self._summary, [*self._earlier, entry, *self._later])
        print(_line(entry), flush=True)


def read_phases(directory: Path) -> list[Entry]:
    """The entries of a directory's phases.json; none where there is none that can be read."""
    try:
        entries: list[Entry] = json.loads((directory / PHASES_FILE).read_text())["phases"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return entries


def _entry(
    phase: Phase, config: TrainConfig, planned: dict[str, int], consumed: dict[str, int], iteration: int
) -> Entry:
    length = config.seq_length
    total = sum(planned.values()) or config.train_iters * config.global_batch_size
    return {
        "phase": phase.number,
        "params": str(phase.params.file.path),
        "model_dir": str(phase.model_dir),
        "steps": {"planned": config.train_iters, "consumed": iteration},
        "tokens": {"planned": total * length, "consumed": sum(consumed.values()) * length},
        "datasets": {
            name: {"planned": samples * length, "consumed": consumed.get(name, 0) * length}
            for name, samples in planned.items()
        },
    }


def _write(directory: Path, entries: Sequence[Entry]) -> None:
    total = {key: sum(entry["tokens"][key] for entry in entries) for key in ("planned", "consumed")}
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{PHASES_FILE}.partial"
    partial.write_text(json.dumps({"phases": list(entries), "tokens": total}, indent=2) + "\n")
    os.replace(partial, directory / PHASES_FILE)


def _line(entry: Entry) -> str:
    def share(name: str, counts: dict[str, int]) -> str:
        return f"{name} {counts['consumed']:,} of {counts['planned']:,}"

    parts = [share("tokens consumed", entry["tokens"])]
    return "; ".join(parts + [share(name, counts) for name, counts in entry["datasets"].items()])
