"""The step FIM on packed sequences: IN/*.h5 -> OUT/epoch_<e>/*.h5, same names, same number of sequences."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.engine import Task, run_step
from data_prep.fim import FimSettings, RowFim
from data_prep.manifest import Record, input_identity, record
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from data_prep.tokenizer import load_tokenizer


class FimTask(NamedTuple):
    """One file in one epoch."""

    source: str
    target: str
    tokenizer: str
    settings: FimSettings
    epoch: int


def fim_files(
    source: Path,
    out: Path,
    tokenizer_path: Path,
    settings: FimSettings,
    *,
    epochs: int = 1,
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Transform every sequence file of `source` `epochs` times, each time with other draws; the manifest.

    Raises:
        InputError: no sequence files, or files that another tokenizer made.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    files = sequence_files(source)
    tasks = []
    for epoch in range(epochs):
        for path in files:
            target = out / f"epoch_{epoch}" / path.name
            task = FimTask(str(path), str(target), str(tokenizer.path), settings, epoch)
            tasks.append(Task(f"{epoch}/{path.name}", task))
    identity = asdict(settings) | {
        "epochs": epochs,
        "tokenizer": tokenizer.fingerprint,
        "inputs": [input_identity(path) for path in files],
    }
    return run_step("fim", out, tasks, fim_file, settings=identity, processes=processes, overwrite=overwrite)


def fim_file(task: FimTask) -> Record:
    """Do one file in one epoch: what the engine's processes run."""
    transform = RowFim(load_tokenizer(task.tokenizer), task.settings)
    name = Path(task.source).name
    with SequenceFile(task.source) as source, SequenceWriter(task.target, source.max_seq_length) as target:
        if task.settings.rate == 0:
            target.write_compressed(source.read_compressed(number) for number in range(len(source)))
        else:
            for number, row in enumerate(source.rows()):
                target.write(transform(row, task.epoch, name, number)[None])
    counts = dict(transform.counts) | {"sequences": target.num_rows}
    return record(inputs=[name], outputs={f"epoch_{task.epoch}/{name}": target.num_rows}, counts=counts)
