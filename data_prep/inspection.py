"""Look at sequences: `crystalcoder data inspect PATH` shows layout, statistics and decoded samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.errors import InputError
from data_prep.manifest import finished_manifest
from data_prep.provenance import Span
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.sources import FaultPolicy, read_documents
from data_prep.tokenizer import Tokenizer
from data_prep.verification import faults_of


@dataclass
class Statistics:
    """What a set of sequence files holds.

    `broken` counts sequences that are not well formed (see verification.faults_of).
    """

    files: int = 0
    sequences: int = 0
    tokens: int = 0
    counted: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    largest_id: int = -1
    broken: int = 0

    def add(self, row: np.ndarray) -> None:
        """Count one sequence (3, L)."""
        tokens, mask, labels = row
        self.sequences += 1
        self.tokens += tokens.size
        self.counted += int(mask.sum())
        self.largest_id = max(self.largest_id, int(tokens.max()), int(labels.max()))
        self.broken += bool(faults_of(row))


def statistics(path: Path) -> Statistics:
    """Read every sequence at `path` (a file, or a folder with folders below it)."""
    result = Statistics()
    for name in sequence_files(path, recursive=True):
        with SequenceFile(name) as file:
            result.files += 1
            result.lengths[file.max_seq_length] += len(file)
            for row in file.rows():
                result.add(row)
    return result


def coloured(row: np.ndarray, tokenizer: Tokenizer) -> Text:
    """A sequence's tokens as text: what is predicted with loss in green, the rest dim, control tokens bold.

    A token is predicted at the position before it, so its colour is the loss mask of the position before it.
    """
    tokens, mask, _ = row
    predicted = np.concatenate([[0], mask[:-1]])
    text = Text()
    start = 0
    controls = set(tokenizer.controls.values())
    is_control = [int(token) in controls or int(token) >= tokenizer.vocab_size for token in tokens]
    kind = list(zip(map(bool, predicted), is_control, strict=True))
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or kind[end] != kind[start]:
            style = ("green" if kind[start][0] else "bright_black") + (" bold" if kind[start][1] else "")
            text.append(tokenizer.decode_inside(tokens[start:end]), style)
            start = end
    return text


def locate(path: Path, row: int) -> list[tuple[Span, str | None]]:
    """The documents of sequence `row` (counted over the sorted files at `path`) and their texts, where still there.

    Raises:
        InputError: no such sequence, or a file that does not say where its sequences came from.
    """
    files = sequence_files(path)
    number = row
    for name in files:
        with SequenceFile(name) as file:
            if not 0 <= number < len(file):
                number -= len(file)
                continue
            spans = file.spans(number)
            if spans is None:
                raise InputError(f"{name}: does not say where its sequences came from")
            return [(span, _text_of(span)) for span in spans]
    raise InputError(f"{path}: sequence {row} is not there: it has {row - number} from 0 on")


def _text_of(span: Span) -> str | None:
    try:
        documents = read_documents(span.path, FaultPolicy("skip"))
        return next((document.text for document in documents if document.number == span.document), None)
    except InputError:
        return None


def show(path: Path, tokenizer: Tokenizer | None, *, samples: list[int] | None, console: Console) -> Statistics:
    """Print layout, statistics, the manifest's counts, and the sequences numbered `samples` of the first file.

    Raises:
        InputError: nothing there, or a sample that is not there.
    """
    if tokenizer:  # before all is read
        file = SequenceFile(sequence_files(path, recursive=True)[0])
        if samples is None:
            samples = [0] if len(file) else []
        for number in samples:
            if not 0 <= number < len(file):
                raise InputError(f"{file.path}: --sample {number}: it has sequences 0 to {len(file) - 1}")
    found = statistics(path)
    table = Table(show_header=False, box=None)
    lengths = ", ".join(f"{length} ({count} sequences)" for length, count in sorted(found.lengths.items()))
    share = 100 * found.counted / max(1, found.tokens)
    for name, value in (
        ("files", found.files),
        ("sequences", found.sequences),
        ("positions each", lengths),
        ("positions", found.tokens),
        ("with loss", f"{found.counted} ({share:.2f} %)"),
        ("largest id", found.largest_id),
        ("not well formed", found.broken),
    ):
        table.add_row(name, str(value))
    manifest = finished_manifest(path) if path.is_dir() else None
    if manifest:
        table.add_row("made by", f"crystalcoder data {manifest['step']}")
        for name, count in manifest["counts"].items():
            table.add_row(f"  {name}", str(count))
    console.print(table)
    if tokenizer:
        for number in samples or ():
            console.rule(f"{file.path} sequence {number}")
            console.print(coloured(file[number], tokenizer))
    return found
