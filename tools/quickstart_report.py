"""What the quickstart shows at its end: a table of the stages and a plot of the losses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from data_prep.sequences import SequenceFile, sequence_files
from tools.quickstart_runner import Done

HIGHEST_LOSS = 10.0  # of the plot
AVERAGED = 10  # the last losses, to even out which rows the very last step happened to see


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one an iteration."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_table(stages: Iterable[Done]) -> Table:
    """Stage, time, tokens (written or trained on), loss of the first step and mean loss of the last ten."""
    table = Table(title="quickstart", title_justify="left")
    table.add_column("stage")
    for heading in ("time", "tokens", "loss before", "loss after"):
        table.add_column(heading, justify="right")
    total = 0.0
    for done in stages:
        total += done.seconds
        time = f"{_minutes(done.seconds)}{' (before)' if done.skipped else ''}"
        table.add_row(done.stage.name, time, *_tokens_and_losses(done))
    table.add_section()
    table.add_row("total", _minutes(total))
    return table


def _tokens_and_losses(done: Done) -> tuple[str, str, str]:
    stage = done.stage
    if stage.metrics is not None:
        records = read_metrics(stage.metrics)
        losses = [record["lm_loss"] for record in records]
        return f"{records[-1]['consumed_tokens']:,}", f"{losses[0]:.3f}", f"{fmean(losses[-AVERAGED:]):.3f}"
    if stage.sequences is not None:
        return f"{count_tokens(stage.sequences):,}", "", ""
    return "", "", ""


def count_tokens(folder: Path) -> int:
    """Positions in the sequence files below a folder."""
    tokens = 0
    for path in sequence_files(folder, recursive=True):
        with SequenceFile(path) as rows:
            tokens += len(rows) * rows.max_seq_length
    return tokens


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def plot_losses(stages: Sequence[Done], out: Path) -> None:
    """Training loss over tokens, one colour a training stage, one after the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    before = 0
    for stage in (done.stage for done in stages if done.stage.metrics is not None):
        assert stage.metrics is not None
        records = read_metrics(stage.metrics)
        tokens = [(before + record["consumed_tokens"]) / 1e6 for record in records]
        axes.plot(tokens, [record["lm_loss"] for record in records], label=stage.name, linewidth=1)
        before += records[-1]["consumed_tokens"]
    # With muP's constants a new model is sure to see each token again: its first few losses are far off the scale.
    axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_LOSS))
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="CrystalCoder quickstart")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = out.with_name(out.name + ".partial")
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(partial, out)
