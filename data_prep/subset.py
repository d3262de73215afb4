"""The step subset: stretches of a folder's rows, named as fractions of it, as files of their own.

`0.0-0.1,0.5-1.0` is the first tenth and the second half: the `data_subset` of a params.yaml's mixtures. Training reads
such a stretch in place; this step is for who wants it as a folder: to ship it, to shuffle it with others, to hold a
part of a folder out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.engine import Task, run_step
from data_prep.errors import InputError
from data_prep.manifest import Record, input_identity, record
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files


def parse_subset(text: str) -> tuple[tuple[float, float], ...]:
    """`"0.0-0.1,0.5-1.0"` as pairs of fractions. InputError unless they rise within [0, 1] without overlap."""
    pairs = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*", part)
        if not match:
            raise InputError(f"data_subset '{text}': write ranges like 0.0-0.1 or 0.0-0.1,0.5-1.0")
        pairs.append((float(match[1]), float(match[2])))
    bounds = [bound for pair in pairs for bound in pair]
    if bounds != sorted(bounds) or bounds[-1] > 1 or any(first == end for first, end in pairs):
        raise InputError(f"data_subset '{text}': ranges rise from 0 to 1 and do not overlap, as in 0.0-0.1,0.5-1.0")
    return tuple(pairs)


def format_subset(subset: Sequence[tuple[float, float]]) -> str:
    """The inverse of `parse_subset`."""
    return ",".join(f"{first}-{end}" for first, end in subset)


def subset_ranges(subset: Sequence[tuple[float, float]], num_rows: int) -> list[tuple[int, int]]:
    """Half-open row ranges of the fractions `subset` of `num_rows` rows; bounds are int(num_rows * fraction)."""
    # Decimal fractions as written: 0.29 * 100 is 28.999... in floating point.
    ranges = [(int(num_rows * Fraction(str(a))), int(num_rows * Fraction(str(b)))) for a, b in subset]
    return [(first, end) for first, end in ranges if first < end]


class SubsetTask(NamedTuple):
    """One file: the stretches of its rows that are kept."""

    source: str
    ranges: tuple[tuple[int, int], ...]
    target: str


def write_subset(
    folder: Path, out: Path, ranges: str, *, processes: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Copy the rows of `ranges` of a folder's files, counted through in the order of their names; the manifest.

    Each file with such rows gives one of its name, with their provenance. Rows are copied as they lie, deflated.

    Raises:
        InputError: no sequence files, wrong ranges, or ranges without any row.
    """
    subset = parse_subset(ranges)
    files = sequence_files(folder)
    ends = np.cumsum([len(SequenceFile(path)) for path in files]).tolist()
    wanted = subset_ranges(subset, ends[-1])
    if not wanted:
        raise InputError(f"{folder}: ranges {ranges} of {ends[-1]} rows hold none: widen them")
    tasks = []
    for path, start, end in zip(files, [0, *ends], ends, strict=False):
        here = [(max(first, start) - start, min(stop, end) - start) for first, stop in wanted]
        if kept := tuple((first, stop) for first, stop in here if first < stop):
            tasks.append(Task(path.stem, SubsetTask(str(path), kept, str(out / path.name))))
    settings = {"ranges": format_subset(subset), "inputs": [input_identity(path) for path in files]}
    return run_step("subset", out, tasks, copy_rows, settings=settings, processes=processes, overwrite=overwrite)


def copy_rows(task: SubsetTask) -> Record:
    """Do one file: what the engine's processes run."""
    target = Path(task.target)
    with SequenceFile(task.source) as source, SequenceWriter(target, source.max_seq_length) as writer:
        table = source.span_table()
        for first, stop in task.ranges:
            spans = table.take(np.arange(first, stop)) if table else None
            writer.write_compressed(source.compressed(first, stop), spans)
    return record(inputs=[task.source], outputs={target.name: writer.summary}, counts={"sequences": writer.num_rows})
