"""A measured table, and its place in docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Table:
    """One benchmark's result: rows of text cells under a header, and what a reader must know to trust them."""

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    command: str = ""  # "": `make bench BENCH=name`

    def markdown(self) -> str:
        """The section of docs/benchmarks.md, between its markers."""
        lines = [
            f"<!-- {self.name} -->",
            f"## {self.title}",
            "",
            f"`{self.command or f'make bench BENCH={self.name}'}`, {date.today()}, {machine()}.",
            self.note,
            "",
            "| " + " | ".join(self.header) + " |",
            "|" + "---|" * len(self.header),
            *("| " + " | ".join(row) + " |" for row in self.rows),
            f"<!-- /{self.name} -->",
        ]
        return "\n".join(lines)

    def write(self, document: Path = DOCUMENT) -> None:
        """Replace this table's section in the document, or add it at the end."""
        text = document.read_text() if document.is_file() else ""
        section = re.compile(f"<!-- {self.name} -->.*<!-- /{self.name} -->", re.DOTALL)
        if section.search(text):
            text = section.sub(lambda _: self.markdown(), text)
        else:
            text = f"{text.rstrip()}\n\n{self.markdown()}\n".lstrip()
        document.write_text(text)


def machine() -> str:
    """The machine in a few words: a ratio holds on another one, an absolute number does not."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    load = os.getloadavg()[1]  # of five minutes
    others = (
        f", beside much else (load average {load:.0f}: wall times say little)"
        if load > 2 * (os.cpu_count() or 1)
        else ""
    )
    return f"{accelerator}, Python {platform.python_version()}, torch {torch.__version__}{others}"


def one_line(error: Exception) -> str:
    """An error as a cell of a table can hold it."""
    return " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:200]


def interleaved(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Best seconds of each way by `clock`, measured in turn, round after round, so that a slow minute hits all alike.

    Every way runs once unmeasured first.
    """
    best = dict.fromkeys(ways, float("inf"))
    for measured in range(rounds + 1):
        for name, run in ways.items():
            start = clock()
            run()
            seconds = clock() - start
            if measured:
                best[name] = min(best[name], seconds)
    return best
