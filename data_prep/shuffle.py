"""The step shuffle: all sequences of many files in one random order, cut into OUT/data-00000.h5, data-00001.h5, …

Any sequence may land anywhere: the order is one permutation of all n sequences that needs no memory (permutation.py).
Output file f holds places [f n / F, (f + 1) n / F). Compressed rows are moved as they are, in two passes over the data
that both read and write in long pieces, so that neither a disk that seeks nor a network file system slows them down:
stretches of the inputs are read once and put down ordered by destination (spill.py), then each output file collects its
pieces. While the step runs, --out takes twice the room of its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.engine import Stage, Task, refuse_out_among, run_step
from data_prep.errors import InputError
from data_prep.manifest import MANIFEST, TASKS, Record, finished_manifest, input_identity, record
from data_prep.permutation import Permutation
from data_prep.provenance import SpanTable
from data_prep.sequences import CHECKSUM_RANGE, SequenceFile, SequenceWriter, sequence_files
from data_prep.spill import Spill, write_spill

# About so many bytes of compressed rows are held at a time, in either pass.
BLOCK_BYTES = 192 << 20
# Smaller inputs are divided into so many stretches, for the processes to share; not into tiny ones.
STRETCHES, STRETCH_BYTES = 16, 4 << 20


class SpillTask(NamedTuple):
    """Some inputs' rows, `start` up to `stop` in the count over all inputs, to one spill file."""

    sources: tuple[str, ...]
    first: int  # number of the first source's first row in the count over all inputs
    start: int
    stop: int
    size: int  # rows of all inputs
    seed: int
    target: str


class ShuffleTask(NamedTuple):
    """One output file: places start … stop - 1, collected from all spill files in pieces of `block` places."""

    spills: tuple[str, ...]
    start: int
    stop: int
    block: int
    max_seq_length: int
    target: str


def shuffle(
    inputs: Sequence[Path],
    out: Path,
    *,
    files: int,
    seed: int,
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the sequences of all files below `inputs`, each once, in random order to `files` files; the manifest.

    The order depends on the inputs' order, their file names and the seed only.

    Raises:
        InputError: no sequences, sequences of different lengths, fewer sequences than files.
    """
    sources = [path for given in inputs for path in sequence_files(given, recursive=True)]
    if len(set(sources)) < len(sources):
        raise InputError(f"{next(p for p in sources if sources.count(p) > 1)}: is named twice among the inputs")
    refuse_out_among(inputs, out)
    sizes = []
    lengths: dict[int, Path] = {}
    for path in sources:
        with SequenceFile(path) as file:
            sizes.append(len(file))
            lengths.setdefault(file.max_seq_length, path)
    if len(lengths) > 1:
        (one, first), (other, second) = list(lengths.items())[:2]
        raise InputError(f"{second}: sequences of {other}, but {first} has {one}: shuffle one length at a time")
    total = sum(sizes)
    if not 1 <= files <= total:
        raise InputError(f"--files {files}: there are {total} sequences, so 1 to {total} files are possible")
    num_bytes = sum(path.stat().st_size for path in sources)
    row_bytes = max(1, num_bytes // total)
    block = max(1, BLOCK_BYTES // row_bytes)
    stretch = max(1, min(BLOCK_BYTES, max(num_bytes // STRETCHES, STRETCH_BYTES)) // row_bytes)
    spill_tasks = list(_spill_tasks(sources, sizes, stretch, seed, out / TASKS))
    spills = tuple(task.target for task in spill_tasks)
    tasks = []
    for number in range(files):
        start, stop = number * total // files, (number + 1) * total // files
        target = str(out / f"data-{number:05d}.h5")
        tasks.append(Task(f"data-{number:05d}", ShuffleTask(spills, start, stop, block, next(iter(lengths)), target)))
    settings = {"files": files, "seed": seed, "inputs": [input_identity(path) for path in sources]}
    manifest = run_step(
        "shuffle",
        out,
        tasks,
        shuffle_file,
        before=Stage([Task(f"spill-{number:05d}", task) for number, task in enumerate(spill_tasks)], spill_rows),
        settings=settings,
        processes=processes,
        overwrite=overwrite,
    )
    # Rows are moved as they lie, deflated: here a damaged one would go unnoticed up to training.
    stated = stated_checksum(sources)
    if stated is not None and stated != sum_of_checksums(manifest["outputs"].values()):
        raise InputError(
            f"{out}: holds other rows than its inputs' manifests state, so an input was damaged or changed since it "
            "was written: find it with `crystalcoder data verify`, write it again, and this with --overwrite"
        )
    return manifest


def _spill_tasks(
    sources: Sequence[Path], sizes: Sequence[int], stretch: int, seed: int, folder: Path
) -> Iterator[SpillTask]:
    """Stretches of at most `stretch` rows, each with the sources that it lies in."""
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    count = -(-total // stretch)
    for number in range(count):
        start, stop = number * total // count, (number + 1) * total // count
        low, high = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop, side="left"))
        names = tuple(map(str, sources[low : high + 1]))
        first = int(ends[low]) - sizes[low]
        yield SpillTask(names, first, start, stop, total, seed, str(folder / f"spill-{number:05d}.rows"))


def spill_rows(task: SpillTask) -> Record:
    """Put one stretch of the inputs down by destination: what the engine's processes run first."""
    destinations = Permutation(task.size, task.seed)(np.arange(task.start, task.stop))
    chunks: list[bytes] = []
    tables: list[SpanTable | None] = []
    first = task.first
    for source in task.sources:
        with SequenceFile(source) as file:
            start, stop = max(task.start - first, 0), min(task.stop - first, len(file))
            chunks += file.compressed(start, stop)
            if start < stop:  # a file without rows says nothing
                table = file.span_table()
                tables.append(table.take(np.arange(start, stop)) if table else None)
            first += len(file)
    known = [table for table in tables if table]
    write_spill(Path(task.target), destinations, chunks, SpanTable.join(known) if len(known) == len(tables) else None)
    return record()


def shuffle_file(task: ShuffleTask) -> Record:
    """Collect one output file: what the engine's processes run then."""
    spills = [Spill(Path(path)) for path in task.spills]
    with SequenceWriter(task.target, task.max_seq_length) as writer:
        for start in range(task.start, task.stop, task.block):
            writer.write_compressed(*_collect(spills, start, min(start + task.block, task.stop)))
    return record(outputs={Path(task.target).name: writer.summary}, counts={"sequences": writer.num_rows})


def stated_checksum(sources: Sequence[Path]) -> int | None:
    """The checksum of the rows of all sources, as the manifests of the folders that they lie in state it; None if one
    does not say."""
    found: dict[Path, tuple[Path, dict[str, Any]] | None] = {}
    stated = []
    for path in (source.resolve() for source in sources):
        if path.parent not in found:
            above = next((folder for folder in path.parents if (folder / MANIFEST).is_file()), None)
            manifest = finished_manifest(above) if above else None
            found[path.parent] = (above, manifest["outputs"]) if above and manifest else None
        outputs = found[path.parent]
        file = outputs and outputs[1].get(path.relative_to(outputs[0]).as_posix())
        if not file or "checksum" not in file:
            return None
        stated.append(file)
    return sum_of_checksums(stated)


def sum_of_checksums(files: Iterable[dict[str, Any]]) -> int:
    """The checksum of the rows of all these files together."""
    return sum(int(file["checksum"], 16) for file in files) % CHECKSUM_RANGE


def _collect(spills: Sequence[Spill], start: int, stop: int) -> tuple[list[bytes], SpanTable | None]:
    """The rows that go to places start … stop - 1, in their order, and their documents."""
    pieces = [spill.read(start, stop) for spill in spills]
    order = np.argsort(np.concatenate([piece.destinations for piece in pieces]))
    chunks = [chunk for piece in pieces for chunk in piece.chunks]
    known = [piece.spans for piece in pieces if piece.spans]
    # Spans are kept for all rows of a file or for none.
    spans = SpanTable.join(known).take(order) if len(known) == len(pieces) else None
    return [chunks[number] for number in order.tolist()], spans
