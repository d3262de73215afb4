"""Rows as a person reads them: their text, the trained tokens coloured. The last look before a run."""

from __future__ import annotations

import html as html_text
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from data_prep.errors import InputError
from data_prep.provenance import Span
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.tokenizer import Tokenizer
from finetune.templates import EOS

CONTROL, TRAINED, TRAINED_CONTROL, CONTEXT = "bold blue", "black on green", "bold white on green", "dim"
ORIGIN = "italic cyan"
TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"  # around trained text where there is no colour


class Run(NamedTuple):
    """Consecutive tokens of one kind. `begins` is set where a document begins behind another, `apart` where it does not
    follow from that (rows of whole documents)."""

    text: str
    trained: bool
    is_control: bool
    begins: bool = False
    apart: bool = False


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
                yield Shown(planes, tuple(map(_origin, rows.spans(number) or ())))


def _origin(span: Span) -> str:
    name = f"{Path(span.path).name} #{span.document + 1}"
    return f"{name} from its token {span.start + 1} on" if span.start else name


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

    Where the next token is not the label (a document begins in a row of whole documents), the token is shown too. What
    fills a row up is told in one run.

    Args:
        row: int32 (3, s): tokens, loss mask, labels.
    """
    controls = set(tokenizer.controls.values())
    shown = list(_shown_tokens(row, tokenizer))
    padding = _padding(shown, tokenizer.eos_id)
    pending: list[int] = []
    kind = (False, False, False, False)  # trained, control, begins, apart
    for token, trained, begins, apart in shown[: len(shown) - padding]:
        new_kind = (trained, token in controls)
        if pending and (new_kind != kind[:2] or begins):
            yield Run(tokenizer.decode(pending), *kind)
            pending = []
        if not pending:
            kind = (*new_kind, begins, apart)
        pending.append(token)
    if pending:
        yield Run(tokenizer.decode(pending), *kind)
    if padding > 1:
        yield Run(f" [{padding - 1} x {EOS} fill the row]", trained=False, is_control=True)


class _ShownToken(NamedTuple):
    token: int
    trained: bool
    begins: bool = False
    apart: bool = False


def _shown_tokens(row: np.ndarray, tokenizer: Tokenizer) -> Iterator[_ShownToken]:
    tokens, mask, labels = row.tolist()
    yield _ShownToken(tokens[0], trained=False)
    before = tokens[0]
    for t, (trained, label) in enumerate(zip(mask, labels, strict=True)):
        follows = t + 1 == len(tokens) or tokens[t + 1] == label
        if follows or trained:
            begins = label == tokenizer.bos_id and before == tokenizer.eos_id
            yield _ShownToken(label, bool(trained), begins)
            before = label
        if not follows:
            before = tokens[t + 1]
            yield _ShownToken(before, trained=False, begins=True, apart=True)


def _padding(shown: Sequence[_ShownToken], eos_id: int) -> int:
    """How many of the last tokens only fill the row: untrained `</s>` behind a document's own."""
    count = 0
    for token, trained, *_ in reversed(shown):
        if token != eos_id:
            return max(count - 1, 0)  # the first of them ends a document whose last answer is not trained
        if trained:
            return count
        count += 1
    return max(count - 1, 0)


def show(path: Path, tokenizer: Tokenizer, console: Console, *, start: int, count: int) -> None:
    """Print `count` rows of `path` from row `start` on.

    Raises:
        InputError: there is no such row.
    """
    has_colour = console.color_system is not None
    for number, (row, origins) in _chosen(path, start, count):
        console.rule(_title(number, row), style=CONTEXT)
        console.print(_legend(has_colour), soft_wrap=True)
        shown = list(runs(row, tokenizer))
        labels, unplaced = _labels(shown, origins)
        if unplaced:
            console.print(Text(unplaced, CONTEXT), soft_wrap=True)
        text = Text()
        for run in shown:
            if run is shown[0] or run.begins:
                text.append("" if run is shown[0] else "\n")
                if label := next(labels, ""):
                    text.append(f"-- {label}\n", ORIGIN)
            if has_colour:
                style = (TRAINED_CONTROL if run.trained else CONTROL) if run.is_control else ""
                text.append(run.text, style or (TRAINED if run.trained else CONTEXT))
            else:
                text.append(f"{TRAINED_OPEN}{run.text}{TRAINED_CLOSE}" if run.trained else run.text)
        console.print(text, soft_wrap=True)


def _legend(has_colour: bool) -> Text:
    if not has_colour:
        return Text(f"{TRAINED_OPEN}trained{TRAINED_CLOSE}: what the model learns to write; the rest is context")
    styles = (("trained", TRAINED), ("control token", CONTROL), ("trained control token", TRAINED_CONTROL))
    parts: list[tuple[str, str]] = [part for name, style in styles for part in ((name, style), ("  ", ""))]
    return Text.assemble(*parts, ("context", CONTEXT))


def _labels(shown: Sequence[Run], origins: Sequence[str]) -> tuple[Iterator[str], str]:
    """What to write above each document, and what to write above the row where documents cannot be told apart."""
    if len(origins) == 1 + sum(run.begins for run in shown):
        return iter(origins), ""
    return iter(()), "from " + ", ".join(origins) if origins else ""


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
a dashed line is where a document begins that does not follow from the one before, so that
<code>--isolate-documents</code> keeps the two apart.</p>
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
                shown = list(runs(row, tokenizer))
                labels, unplaced = _labels(shown, origins)
                if unplaced:
                    page.write(f"<small>{html_text.escape(unplaced)}</small>\n")
                page.write("<pre>")
                for run in shown:
                    if run.begins:
                        page.write("<hr>" if run.apart else "\n")
                    if (run is shown[0] or run.begins) and (label := next(labels, "")):
                        page.write(f"<small>{html_text.escape(label)}</small>\n")
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
