"""The step partition: the records of JSON lines into folders, by a key's value and into train and valid.

SlimPajama's files mix seven sources, which the phases weigh one by one; StarCoderData has no validation part. Both are
sorted out here, before FIM and packing, so that no document is on both sides. A record's bytes stay as they are; the
files are named like the inputs, packed with zstd: OUT/[train|valid]/[<value>]/<input name>.jsonl.zst.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import zstandard
from isal.isal_zlib import crc32

from data_prep.engine import Task, refuse_out_among, run_step
from data_prep.errors import InputError
from data_prep.manifest import Record, input_identity, record
from data_prep.sources import LINES_SUFFIXES, Fault, FaultPolicy, discover, parse_record
from data_prep.streams import open_bytes

FOLDER_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class PartitionOptions:
    """All that decides where a record goes.

    Attributes:
        key: path of a key in the record (`meta.redpajama_set_name`); its value names the folder. None: one folder.
        valid: share of the records that goes to `valid`, by (seed, file name, line); 0: neither `train` nor `valid`.
    """

    key: str | None = None
    valid: float = 0.0
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not 0 <= self.valid < 1:
            raise InputError(f"--valid {self.valid}: is a share, from 0 to below 1")
        if not self.key and not self.valid:
            raise InputError("partition: give --key, --valid, or both")


class PartitionTask(NamedTuple):
    """One input file."""

    options: PartitionOptions
    source: str
    name: str
    out: str


def partition(
    inputs: Sequence[str], out: Path, options: PartitionOptions, *, processes: int = 1, overwrite: bool = False
) -> dict[str, Any]:
    """Sort the records of all files of `inputs` into folders below `out`; the manifest.

    Raises:
        InputError: files that are no JSON lines, or a bad record (unless `options.on_error` is "skip").
    """
    sources = discover(list(inputs))
    names: dict[str, str] = {}
    for source in sources:
        if not source.path.endswith(LINES_SUFFIXES):
            raise InputError(f"{source.path}: is not JSON lines: only {', '.join(LINES_SUFFIXES)} can be partitioned")
        name = source.name.removesuffix(".gz").removesuffix(".zst") + ".zst"
        if name in names:
            raise InputError(f"{source.path}: would be written over {names[name]}: rename one")
        names[name] = source.path
    refuse_out_among(inputs, out)
    tasks = [Task(name, PartitionTask(options, path, name, str(out))) for name, path in names.items()]
    settings = asdict(options) | {
        "inputs": [{"name": source.name, **input_identity(source.path)} for source in sources]
    }
    return run_step(
        "partition", out, tasks, partition_file, settings=settings, processes=processes, overwrite=overwrite
    )


def partition_file(task: PartitionTask) -> Record:
    """Sort the records of one file: what the engine's processes run."""
    options = task.options
    faults = FaultPolicy(options.on_error)
    counts: Counter[str] = Counter()
    checksums: dict[str, int] = {}
    writers: dict[str, BinaryIO] = {}
    number = 0  # of records that were read
    with ExitStack() as stack:
        try:
            with open_bytes(task.source) as stream:
                for line in stream:
                    folder = _folder_of(line, number, task, faults)
                    number += 1
                    if folder is None:
                        continue
                    counts[folder] += 1
                    if folder not in writers:
                        writers[folder] = stack.enter_context(_zstd_writer(_partial(task, folder)))
                    line = line if line.endswith(b"\n") else line + b"\n"
                    checksums[folder] = crc32(line, checksums.get(folder, 0))
                    writers[folder].write(line)
        except BaseException as error:
            if not isinstance(error, InputError) or options.on_error == "stop":
                for folder in writers:
                    _partial(task, folder).unlink()
                raise
            # The file is damaged or may not be read: what was read of it is kept.
            reason = str(error).removeprefix(task.source).lstrip(": ")
            faults(Fault(task.source, f"after {number}", f"{reason}; the rest is left out"))
    for folder in writers:
        os.replace(_partial(task, folder), Path(task.out, folder, task.name))
    outputs = {
        f"{folder}/{task.name}": {"rows": count, "checksum": f"{checksums[folder]:08x}"}
        for folder, count in sorted(counts.items())
    }
    by_folder = {f"documents_{folder}": count for folder, count in counts.items()}
    return record(
        inputs=[task.source], outputs=outputs, counts={"documents": counts.total(), **by_folder}, faults=faults.faults
    )


def _folder_of(line: bytes, number: int, task: PartitionTask, faults: FaultPolicy) -> str | None:
    """Where a record goes; None for a bad one, which `faults` has then got."""
    options = task.options
    parts = []
    if options.valid:
        key = f"{options.seed}/{task.name}/{number}".encode()
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        parts.append("valid" if draw < options.valid else "train")
    if options.key:
        value, reason = parse_record(line)
        for name in options.key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not reason and not (isinstance(value, str) and FOLDER_NAME.fullmatch(value)):
            reason = f"{options.key!r} is {value!r}, which is no name for a folder"
        if reason:
            faults(Fault(task.source, str(number + 1), reason))
            return None
        parts.append(value)
    return "/".join(parts)


def _partial(task: PartitionTask, folder: str) -> Path:
    return Path(task.out, folder, f"{task.name}.partial")


def _zstd_writer(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3, write_checksum=True))
    return writer
