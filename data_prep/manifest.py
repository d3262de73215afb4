"""The audit of a step: `manifest.json` beside its output says what went in, with which options, and what came out.

A task's `Record` is {"inputs": […], "outputs": {file: {"rows": n, …}}, "counts": {…}, "faults": […]}; the manifest adds
them up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.streams import is_url, size_of

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TASKS = ".tasks"  # folder of a step that is not finished yet: what is done so far
FORMAT = 1
ENDS = 1 << 16
HASH = "hash_of_ends"

Record = dict[str, Any]


def record(
    *,
    inputs: Sequence[str] = (),
    outputs: dict[str, dict[str, Any]] | None = None,
    counts: dict[str, int] | None = None,
    faults: Iterable[Any] = (),
) -> Record:
    """What one task did: the inputs it read, the files it wrote (name -> rows, checksum), counts, records left out."""
    rejects = [{"file": f.path, "place": f.place, "reason": f.reason} for f in faults]
    return {"inputs": list(inputs), "outputs": outputs or {}, "counts": counts or {}, "faults": rejects}


def fingerprint_of(step: str, settings: dict[str, Any]) -> str:
    """One hash of all that decides a step's output, but for its inputs' contents: where a step stopped at a damaged
    file, it shall go on when that is mended."""
    inputs = [{name: value for name, value in entry.items() if name != HASH} for entry in settings.get("inputs", ())]
    known = settings | {"inputs": inputs} if inputs else settings
    plain = json.dumps([FORMAT, step, known], sort_keys=True, default=str)
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def input_identity(path: str | Path) -> dict[str, Any]:
    """An input as the settings name it: path, size, and a hash of its ends."""
    return {"path": str(path), "bytes": size_of(str(path)), HASH: _hash_of_ends(str(path))}


def _hash_of_ends(path: str) -> str | None:
    """A hash of a file's first and last ENDS bytes: a corpus is too large to be read once more for this, and what is
    packed ends with a checksum or an index. None behind a URL, and for what cannot be read (who reads it says so).
    """
    if is_url(path):
        return None
    try:
        with Path(path).open("rb", buffering=0) as file:
            digest = hashlib.blake2b(file.read(ENDS), digest_size=8)
            size = os.fstat(file.fileno()).st_size
            if size > ENDS:
                file.seek(max(ENDS, size - ENDS))
                digest.update(file.read(ENDS))
    except OSError:
        return None
    return digest.hexdigest()


def finished_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished step, None where there is none.

    Raises:
        InputError: it is there and damaged.
    """
    path = out / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        manifest["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is not a manifest: delete it, or --overwrite the folder") from None
    return manifest


def write_manifest(
    step: str,
    out: Path,
    fingerprint: str,
    settings: dict[str, Any],
    records: Sequence[Record],
) -> dict[str, Any]:
    """Add up the tasks' records and write `out/manifest.json` (and `rejects.jsonl`, if records were left out).

    Nothing in it depends on when or how fast the step ran: the same input gives the same bytes.
    """
    counts: Counter[str] = Counter()
    outputs: dict[str, dict[str, Any]] = {}
    faults = []
    for task in records:
        counts.update(task["counts"])
        outputs.update(task["outputs"])
        faults.extend(task["faults"])
    manifest = {
        "step": step,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": settings,
        "versions": {name: version(name) for name in ("crystalcoder", "numpy", "h5py", "tokenizers")},
        "counts": dict(sorted(counts.items())) | {"rejected": len(faults)},
        "outputs": dict(sorted(outputs.items())),
    }
    if faults:
        write_whole(out / REJECTS, "".join(json.dumps(fault) + "\n" for fault in faults))
    write_whole(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def report(out: Path, manifest: dict[str, Any]) -> None:
    """Print what a step has done, in one line."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in manifest["counts"].items())
    print(f"{out}: {len(manifest['outputs'])} files; {counts}")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
