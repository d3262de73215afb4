"""The step FIM on packed sequences: each file in each epoch becomes a file of the same name and number of sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.engine import Task, run_step
from data_prep.errors import InputError
from data_prep.fim import FimSettings, RowFim
from data_prep.manifest import Record, input_identity, record
from data_prep.reference_fim import ReferenceFimTask, fim_file_like_reference
from data_prep.sequences import SequenceFile, SequenceWriter, compress_row, sequence_files
from data_prep.tokenizer import load_tokenizer_once


class FimSource(NamedTuple):
    """A folder of sequence files (or one file), the folder below --out for an epoch's files, and which files.

    `names` lists the files in an order of their own; () stands for all, sorted.
    """

    path: Path
    folder: str = "epoch_{}"
    names: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """The sequence files, in order."""
        if not self.names:
            return sequence_files(self.path)
        return [file for name in self.names for file in sequence_files(self.path / name)]


class FimTask(NamedTuple):
    """One file in one epoch."""

    source: str
    target: str
    out: str
    tokenizer: str
    settings: FimSettings
    epoch: int
    name: str  # stands for the file in the key of its chances


def fim_files(
    sources: Sequence[FimSource],
    out: Path,
    tokenizer_path: Path,
    settings: FimSettings,
    *,
    epochs: int = 1,
    processes: int = 1,
    overwrite: bool = False,
    reference_groups: int | None = None,
) -> dict[str, Any]:
    """Transform every sequence file of `sources` `epochs` times, each time with other draws; the manifest.

    Args:
        reference_groups: do as the reference does (see reference_fim.py), its files dealt to so many processes; 0 for
            one process per file, as in its stage 3. None: as RowFim does.

    Raises:
        InputError: no sequence files, or files that another tokenizer made.
    """
    if epochs < 1:
        raise InputError(f"--epochs {epochs}: at least 1 is needed")
    if reference_groups is not None:
        _check_reference(settings, reference_groups)
    tokenizer = load_tokenizer_once(str(tokenizer_path))
    files = [(path, source.folder) for source in sources for path in source.files()]
    if twice := [place for place, count in Counter((folder, path.name) for path, folder in files).items() if count > 1]:
        raise InputError(f"{twice[0][0].format('*')}/{twice[0][1]}: would be written twice: name each input once")
    tasks = []
    for number, (path, folder) in enumerate(files):
        targets = tuple(str(out / folder.format(epoch) / path.name) for epoch in range(epochs))
        if reference_groups is not None:
            group = number // -(-len(files) // reference_groups) if reference_groups else number
            seed = settings.seed + group
            reference = ReferenceFimTask(str(path), targets, str(out), str(tokenizer.path), settings, seed)
            tasks.append(Task(f"file_{number}", reference))
            continue
        # One source: the file's name is enough. Several: files of the same name must not share their chances.
        name = path.name if len(sources) == 1 else f"{folder.format('')}/{path.name}"
        for epoch, target in enumerate(targets):
            task = FimTask(str(path), target, str(out), str(tokenizer.path), settings, epoch, name)
            tasks.append(Task(f"file_{number}_epoch_{epoch}", task))
    identity = asdict(settings) | {
        "epochs": epochs,
        "reference_groups": reference_groups,
        "folders": [source.folder for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size_with_fim,
        "inputs": [input_identity(path) for path, _ in files],
    }
    work = fim_file if reference_groups is None else fim_file_like_reference
    return run_step("fim", out, tasks, work, settings=identity, processes=processes, overwrite=overwrite)


def _check_reference(settings: FimSettings, groups: int) -> None:
    if groups < 0:
        raise InputError(f"--reference-processes {groups}: at least 1 is needed")
    if settings.level != "char":
        raise InputError(
            f"--level {settings.level}: the reference cuts between characters: not with --reference-compat"
        )
    if not 0 <= settings.seed < 1 << 31:
        raise InputError(f"--seed {settings.seed}: with --reference-compat from 0 to {(1 << 31) - 1}")


def fim_file(task: FimTask) -> Record:
    """Do one file in one epoch: what the engine's processes run."""
    transform = RowFim(load_tokenizer_once(task.tokenizer), task.settings)
    with SequenceFile(task.source) as source, SequenceWriter(task.target, source.max_seq_length) as target:
        spans = source.span_table()
        if spans:
            target.write_compressed([], spans)
        if task.settings.rate == 0:
            target.write_compressed(source.compressed())
        else:
            target.write_compressed(_transformed(source, transform, task))
    counts = dict(transform.counts) | {"sequences": target.num_rows}
    output = Path(task.target).relative_to(task.out).as_posix()
    return record(inputs=[task.source], outputs={output: target.summary}, counts=counts)


def _transformed(source: SequenceFile, transform: RowFim, task: FimTask) -> Iterator[bytes]:
    """The file's sequences, deflated; those that chance leaves as they are need not be deflated again."""
    for number, (row, chunk) in enumerate(source.rows_and_chunks()):
        result = transform(row, task.epoch, task.name, number)
        yield chunk if np.array_equal(result, row) else compress_row(result)
