"""Rows as a person reads them: their text in the terminal, the trained tokens coloured. The last look before a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.tokenizer import Tokenizer

CONTROL, TRAINED, TRAINED_CONTROL, CONTEXT = "bold blue", "black on green", "bold white on green", "dim"
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"  # around trained text where there is no colour


class Run(NamedTuple):
    """Consecutive tokens of one kind."""

    text: str
    trained: bool
    is_control: bool


def read_rows(path: Path) -> Iterator[np.ndarray]:
    """Rows, int32 (3, s), of a sequence file, a folder of them, or a processed JSONL file."""
    if path.suffix == ".jsonl":
        yield from _processed_rows(path)
        return
    for file in sequence_files(path):
        with SequenceFile(file) as rows:
            yield from rows.rows()


def _processed_rows(path: Path) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield np.array([row["token_ids"], row["loss_mask"], row["label_ids"]], dtype=np.int32)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise InputError(
                    f"{path}, line {number}: not a processed row ({error!r}): it needs token_ids, loss_mask and "
                    "label_ids, integer lists of one length"
                ) from None


def runs(row: np.ndarray, tokenizer: Tokenizer) -> Iterator[Run]:
    """The row's first token and all its labels as runs of text; a label is trained where the loss mask is set.

    Args:
        row: int32 (3, s): tokens, loss mask, labels.
    """
    ids = [int(row[0, 0]), *map(int, row[2])]
    trained = [False, *(bool(m) for m in row[1])]
    controls = set(tokenizer.controls.values())
    kinds = [(t, i in controls) for t, i in zip(trained, ids, strict=True)]
    start = 0
    for (is_trained, is_control), group in groupby(kinds):
        end = start + len(list(group))
        yield Run(tokenizer.decode(ids[start:end]), is_trained, is_control)
        start = end


def show(path: Path, tokenizer: Tokenizer, console: Console, *, start: int, count: int) -> None:
    """Print `count` rows of `path` from row `start` on.

    Raises:
        InputError: there is no such row.
    """
    has_colour = console.color_system is not None
    shown = 0
    for number, row in enumerate(islice(read_rows(path), start, start + count), start=start):
        shown += 1
        mask = row[1]
        console.rule(f"row {number}: {len(mask)} positions, {int(mask.sum())} trained ({mask.mean():.0%})")
        text = Text()
        for run in runs(row, tokenizer):
            if has_colour:
                style = (TRAINED_CONTROL if run.trained else CONTROL) if run.is_control else ""
                text.append(run.text, style or (TRAINED if run.trained else CONTEXT))
            else:
                text.append(f"{TRAINED_OPEN}{run.text}{TRAINED_CLOSE}" if run.trained else run.text)
        console.print(text, soft_wrap=True)
    if not shown:
        raise InputError(f"{path}: has no row {start}: choose a smaller --start")
