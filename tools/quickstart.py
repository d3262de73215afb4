"""`crystalcoder quickstart`: the whole chain on this machine, from the text of Python's library to a chat answer."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from data_prep.errors import InputError, exits_on_bad_input
from tools.quickstart_report import plot_losses, stage_table
from tools.quickstart_runner import ROOT, Done, Runner, StageFailed, end_stage_on_sigterm
from tools.quickstart_stages import FULL, MINIATURE, Scale, stages

DEFAULT_DIRECTORY = Path("runs/quickstart")


class ScaleName(StrEnum):
    """How much of everything."""

    full = "full"
    tiny = "tiny"


SCALES: dict[ScaleName, Scale] = {ScaleName.full: FULL, ScaleName.tiny: MINIATURE}


@exits_on_bad_input
def quickstart(
    directory: Annotated[Path, typer.Option("--dir", help="where everything is written")] = DEFAULT_DIRECTORY,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of skipping what was done")] = False,
    scale: Annotated[
        ScaleName, typer.Option(help="tiny: a few steps of everything, to see that it runs", hidden=True)
    ] = ScaleName.full,
) -> None:
    """Text -> tokens -> three pretraining phases -> conversion -> instruction tuning -> a model that answers.

    Every stage prints the commands that it runs; they can be typed in the checkout just so. Stages that were done
    are skipped on the next run.
    """
    end_stage_on_sigterm()
    console = Console()
    directory = directory.resolve()
    if fresh:
        _start_over(directory)
    plan = stages(_as_typed(directory), SCALES[scale])
    runner = Runner(directory, console)
    done: list[Done] = []
    try:
        for number, stage in enumerate(plan, start=1):
            done.append(runner.run(stage, number, len(plan)))
    except StageFailed as failure:
        console.print(Text(str(failure), style="red"), soft_wrap=True)
        raise typer.Exit(1) from None

    answers = runner.log(plan[-1]).read_text(errors="replace").strip()
    console.print(Panel(Text(answers), title="what the model says", title_align="left"))
    plot = directory / "loss.png"
    plot_losses(done, plot)
    console.print(stage_table(done))
    console.print(f"losses: {plot}   logs: {directory / 'logs'}", soft_wrap=True, highlight=False)


def _as_typed(directory: Path) -> Path:
    """The path as the printed commands name it: they are typed in the checkout."""
    return directory.relative_to(ROOT) if directory.is_relative_to(ROOT) else directory


def _start_over(directory: Path) -> None:
    """Delete an earlier run, and nothing else.

    Raises:
        InputError: the directory holds something that is not a quickstart's.
    """
    if directory.exists() and any(directory.iterdir()):
        if not (directory / "stamps").is_dir():
            raise InputError(f"{directory}: is not an earlier quickstart's directory: --fresh would delete its files")
        shutil.rmtree(directory)


def main(arguments: list[str]) -> None:
    """The `crystalcoder quickstart` subcommand."""
    app = typer.Typer(add_completion=False)
    app.command()(quickstart)
    app(args=arguments, prog_name="crystalcoder quickstart")
