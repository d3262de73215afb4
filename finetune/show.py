"""Rows as a person reads them: their text, the trained tokens coloured. The last look before a run."""

from __future__ import annotations

import html as html_text
import json
import os
from collections.abc import Iterator
from itertools import islice
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
    """Consecutive tokens of one kind. `begins` is set where a document begins that does not follow from the last."""

    text: str
    trained: bool
    is_control: bool
    begins: bool = False


class Shown(NamedTuple):
    """A row, int32 (3, s), and where its documents come from ("chats.jsonl #3"), where the file says so."""

    planes: np.ndarray
    origins: tuple[str, ...] = ()


def read_rows(path: Path) -> Iterator[Shown]:
    """The rows of a sequence file, a folder of them, or a processed JSONL file."""
    if path.suffix == ".jsonl":
        yield from _processed_rows(path)
        return
    for file in sequence_files(path):
        with SequenceFile(file) as rows:
            for number, planes in enumerate(rows.rows()):
                spans = rows.spans(number) or ()
                yield Shown(planes, tuple(f"{Path(span.path).name} #{span.document + 1}" for span in spans))


def _processed_rows(path: Path) -> Iterator[Shown]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield Shown(np.array([row["token_ids"], row["loss_mask"], row["label_ids"]], dtype=np.int32))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise InputError(
                    f"{path}, line {number}: not a processed row ({error!r}): it needs token_ids, loss_mask and "
                    "label_ids, integer lists of one length"
                ) from None


def runs(row: np.ndarray, tokenizer: Tokenizer) -> Iterator[Run]:
    """The row's first token and all its labels as runs of text; a label is trained where the loss mask is set.

    Where the next token is not the label (a document begins in a row of whole documents), the token is shown too.

    Args:
        row: int32 (3, s): tokens, loss mask, labels.
    """
    controls = set(tokenizer.controls.values())
    pending: list[int] = []
    kind = (False, False, False)  # trained, control, begins
    for token, trained, begins in _shown_tokens(row):
        new_kind = (trained, token in controls)
        if pending and (new_kind != kind[:2] or begins):
            yield Run(tokenizer.decode(pending), *kind)
            pending = []
        if not pending:
            kind = (*new_kind, begins)
        pending.append(token)
    if pending:
        yield Run(tokenizer.decode(pending), *kind)


def _shown_tokens(row: np.ndarray) -> Iterator[tuple[int, bool, bool]]:
    tokens, mask, labels = row.tolist()
    yield tokens[0], False, False
    for t, (trained, label) in enumerate(zip(mask, labels, strict=True)):
        follows = t + 1 == len(tokens) or tokens[t + 1] == label
        if follows or trained:
            yield label, bool(trained), False
        if not follows:
            yield tokens[t + 1], False, True


def show(path: Path, tokenizer: Tokenizer, console: Console, *, start: int, count: int) -> None:
    """Print `count` rows of `path` from row `start` on.

    Raises:
        InputError: there is no such row.
    """
    has_colour = console.color_system is not None
    for number, (row, origins) in _chosen(path, start, count):
        console.rule(_title(number, row))
        if origins:
            console.print(Text("from " + ", ".join(origins), CONTEXT), soft_wrap=True)
        text = Text()
        for run in runs(row, tokenizer):
            if run.begins:
                text.append("\n")
            if has_colour:
                style = (TRAINED_CONTROL if run.trained else CONTROL) if run.is_control else ""
                text.append(run.text, style or (TRAINED if run.trained else CONTEXT))
            else:
                text.append(f"{TRAINED_OPEN}{run.text}{TRAINED_CLOSE}" if run.trained else run.text)
        console.print(text, soft_wrap=True)


def _chosen(path: Path, start: int, count: int) -> Iterator[tuple[int, Shown]]:
    number = None
    for number, shown in enumerate(islice(read_rows(path), start, start + count), start=start):
        yield number, shown
    if number is None:
        raise InputError(f"{path}: has no row {start}: choose a smaller --start")


def _title(number: int, row: np.ndarray) -> str:
    mask = row[1]
    return f"row {number}: {len(mask)} positions, {int(mask.sum())} trained ({mask.mean():.0%})"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #444 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; background: #f6f6f6;
  padding: 1rem; border-radius: 6px }}
.trained {{ background: #b7ebc0; color: #000 }} .control {{ color: #1a4fc4; font-weight: bold }}
hr {{ border: 0; border-top: 1px dashed #999 }} small {{ color: #777 }}
</style></head><body>
<h1>{title}</h1>
<p><span class="trained">trained</span> text is what the model learns to write;
<span class="control">control tokens</span> are the chat format's;
a dashed line is where a document begins that does not see the one before.</p>
"""


def write_html(path: Path, tokenizer: Tokenizer, target: Path, *, start: int, count: int) -> None:
    """Write `count` rows of `path` from row `start` on as one HTML page.

    Raises:
        InputError: there is no such row, or the page cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as page:
            page.write(_PAGE.format(title=html_text.escape(f"Rows of {path}")))
            for number, (row, origins) in _chosen(path, start, count):
                page.write(f"<h2>{_title(number, row)}</h2>\n")
                if origins:
                    page.write(f"<small>from {html_text.escape(', '.join(origins))}</small>\n")
                page.write("<pre>")
                for run in runs(row, tokenizer):
                    if run.begins:
                        page.write("<hr>")
                    page.write(_span(run))
                page.write("</pre>\n")
            page.write("</body></html>\n")
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}): choose another --html") from None
    finally:
        partial.unlink(missing_ok=True)


def _span(run: Run) -> str:
    classes = " ".join(name for name, on in (("trained", run.trained), ("control", run.is_control)) if on)
    text = html_text.escape(run.text)
    return f'<span class="{classes}">{text}</span>' if classes else text
