"""Prove sequences: `crystalcoder data verify PATH` reads every row and names everything that is wrong.

Of each row: ids in range, a loss mask of 0 and 1, labels that are the following tokens; where packing made it, no
position without loss before one with it. Of a step's folder, against its manifest: the files and no others, their rows,
a checksum over all rows that no lost, doubled or damaged row leaves as it was, their order, the documents that
they are said to come from, the counts of rows and of padding; and for a shuffle, that it holds exactly the rows of its
inputs, as far as they are still there. Of a step that writes lines: the files and no others, their lines' number and
checksum.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from isal.isal_zlib import crc32

from data_prep.errors import InputError
from data_prep.manifest import TASKS, finished_manifest
from data_prep.sequences import CHECKSUM_RANGE, Checksums, SequenceFile, row_checksum, sequence_files
from data_prep.sources import LINES_SUFFIXES, OWN_FILES
from data_prep.streams import READ_SIZE, files_below, open_bytes

LINES_STEPS = ("parquet2jsonl", "partition")
# A file with a systematic fault has it in every row: this many are listed.
ROWS_LISTED = 20


def faults_of(row: np.ndarray, vocab_size: int | None = None, *, is_packed: bool = False) -> list[str]:
    """What is wrong with one sequence (3, L); [] if it is well formed. `is_packed`: padding is only at its end."""
    tokens, mask, labels = row
    faults = []
    if not np.isin(mask, (0, 1)).all():
        faults.append(f"loss mask holds {mask[~np.isin(mask, (0, 1))][0]}")
    smallest, largest = int(min(tokens.min(), labels.min())), int(max(tokens.max(), labels.max()))
    if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
        faults.append(f"ids from {smallest} to {largest}" + (f", {vocab_size} are known" if vocab_size else ""))
    if is_packed and len(holes := np.flatnonzero(np.diff(mask) > 0)):
        faults.append(f"position {holes[0]}: loss mask 0, but the next position counts")
    # Up to the last position that counts, every label that counts is the token that follows.
    counted = np.flatnonzero(mask)
    before_last = counted[:-1]
    wrong = before_last[labels[before_last] != tokens[before_last + 1]]
    if len(wrong):
        at = int(wrong[0])
        faults.append(f"position {at}: label {labels[at]}, but token {tokens[at + 1]} follows ({len(wrong)} such)")
    return faults


def verify(path: Path, vocab_size: int | None = None) -> list[str]:
    """All that is wrong at `path` (a sequence file or a step's folder), a line each; [] if nothing is.

    Raises:
        InputError: nothing there.
    """
    manifest = finished_manifest(path) if path.is_dir() else None
    if manifest and manifest["step"] in LINES_STEPS:
        return _unfinished(path) + _lines_against_manifest(path, manifest)
    faults: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    settings = manifest["settings"] if manifest else {}
    vocab_size = vocab_size or settings.get("vocab_size")
    is_packed = manifest is not None and _is_packed(manifest)
    for name in sequence_files(path, recursive=True):
        try:
            found_there, file_faults = _verify_file(name, vocab_size, is_packed=is_packed)
        except InputError as error:
            faults.append(str(error))
            continue
        faults += file_faults
        found[name.relative_to(path).as_posix() if path.is_dir() else name.name] = found_there
    if path.is_dir():
        faults += _unfinished(path)
    if manifest:
        faults += _against_manifest(path, manifest, found)
    return faults


def _unfinished(path: Path) -> list[str]:
    faults = [f"{p}: is incomplete: run the step again" for p in sorted(path.rglob("*.partial"))]
    return [*faults, f"{path}: the step is not finished: run it again"] if (path / TASKS).exists() else faults


def _lines_against_manifest(path: Path, manifest: dict[str, Any]) -> list[str]:
    faults = []
    stated = manifest["outputs"]
    found = {p.relative_to(path).as_posix() for p in files_below(path) if p.name.endswith(LINES_SUFFIXES)}
    for name in sorted(stated.keys() | found):
        if name.startswith(f"{TASKS}/") or name in OWN_FILES:
            continue
        if name not in stated:
            faults.append(f"{path / name}: is not in the manifest")
            continue
        rows = checksum = 0
        try:
            with open_bytes(str(path / name)) as lines:
                while block := lines.read(READ_SIZE):
                    rows += block.count(b"\n")
                    checksum = crc32(block, checksum)
        except InputError as error:
            faults.append(str(error))
            continue
        if rows != stated[name]["rows"]:
            faults.append(f"{path / name}: has {rows} lines, not {stated[name]['rows']} as stated")
        elif stated[name].get("checksum", f"{checksum:08x}") != f"{checksum:08x}":  # earlier versions state none
            faults.append(f"{path / name}: its lines are not those that were written (checksum {checksum:08x})")
    return faults


def _is_packed(manifest: dict[str, Any]) -> bool:
    """Whether the step has packed its rows itself, and not taken their loss mask as it was."""
    settings = manifest["settings"]
    if manifest["step"] == "fim":
        return settings["rate"] > 0 and settings["reference_groups"] is None
    return bool(manifest["step"] == "tokenize")


def _verify_file(path: Path, vocab_size: int | None, *, is_packed: bool) -> tuple[dict[str, Any], list[str]]:
    faults, checksums, padding = [], Checksums(), 0
    with SequenceFile(path) as file:
        with h5py.File(path) as plain:
            stated = plain.attrs.get("n_examples")
        if stated != len(file):
            faults.append(f"{path}: n_examples is {stated}, there are {len(file)} rows")
        for number, (row, chunk) in enumerate(file.rows_and_chunks()):
            checksums.add(chunk)
            padding += int(np.count_nonzero(row[1] == 0))
            for fault in faults_of(row, vocab_size, is_packed=is_packed):
                faults.append(f"{path}: row {number}: {fault}")
        if len(faults) > ROWS_LISTED:
            faults = [*faults[:ROWS_LISTED], f"{path}: and {len(faults) - ROWS_LISTED} more"]
        found = {"rows": len(file), **checksums.summary, "padding": padding}
        try:
            table = file.span_table()
            found["documents"] = table.digest if table else None
        except InputError as error:
            faults.append(str(error))
        return found, faults


def _against_manifest(path: Path, manifest: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[str]:
    faults = []
    stated = {name: file for name, file in manifest["outputs"].items() if name.endswith(".h5")}
    for name in sorted(stated.keys() | found.keys()):
        if name not in found:
            faults.append(f"{path / name}: is missing or unreadable; the manifest lists it")
        elif name not in stated:
            faults.append(f"{path / name}: is not in the manifest")
        else:
            for key, what in (("rows", "rows"), ("checksum", "a checksum of the rows of")):
                if stated[name][key] != found[name][key]:
                    faults.append(f"{path / name}: has {what} {found[name][key]}, not {stated[name][key]} as stated")
            # Manifests of earlier versions lack these two.
            is_same = stated[name]["checksum"] == found[name]["checksum"]
            if is_same and stated[name].get("order", found[name]["order"]) != found[name]["order"]:
                faults.append(f"{path / name}: its rows have changed places")
            if "documents" in stated[name] and stated[name]["documents"] != found[name].get("documents"):
                faults.append(
                    f"{path / name}: names other documents as the sources of its rows than when it was written"
                )
    for name, key in (("sequences", "rows"), ("padding", "padding")):
        total = sum(file[key] for file in found.values())
        if stated.keys() == found.keys() and manifest["counts"].get(name, total) != total:
            faults.append(f"{path}: has {name} {total}, the manifest counts {manifest['counts'][name]}")
    if manifest["step"] == "shuffle" and not faults:
        inputs = [Path(entry["path"]) for entry in manifest["settings"]["inputs"]]
        if all(p.exists() for p in inputs) and _total(inputs) != _sum(file["checksum"] for file in found.values()):
            faults.append(f"{path}: does not hold the rows of its inputs, each once")
    return faults


def _total(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        with SequenceFile(path) as file:
            total += sum(map(row_checksum, file.compressed()))
    return total % CHECKSUM_RANGE


def _sum(checksums: Iterable[str]) -> int:
    return sum(int(checksum, 16) for checksum in checksums) % CHECKSUM_RANGE
