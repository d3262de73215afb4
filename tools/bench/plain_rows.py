"""The straightforward way to do what the commands on packed rows do, for comparison.

python -m tools.bench.plain_rows fim FOLDER OUT TOKENIZER RATE EPOCHS
python -m tools.bench.plain_rows shuffle FOLDER OUT FILES

FIM is the reference's: every text is decoded, cut between two characters, and encoded again part by part; without the
vocabulary that the reference's stage 3 builds anew for each row. Shuffling reads row by row through h5py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tokenizers import Tokenizer

EOS, BATCH = 2, 512
MARKS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")  # ids 32000 … 32003 behind LLaMA's vocabulary


def fim_file(source: Path, targets: Sequence[Path], tokenizer: Any, rate: float, seed: int = 0) -> None:
    """One file in all epochs, a target for each: rows outside, epochs inside, one random stream for all."""
    tokenizer.add_special_tokens(list(MARKS))
    random = np.random.RandomState(seed)
    with h5py.File(source) as file:
        rows = file["data"][:]
    epochs: list[list[np.ndarray]] = [[] for _ in targets]
    for row in rows:
        for epoch in epochs:
            epoch.append(fim_row(row, tokenizer, random, rate))
    for epoch, target in zip(epochs, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, epoch)


def fim_row(row: np.ndarray, tokenizer: Any, random: Any, rate: float) -> np.ndarray:
    """One row (3, L) as the reference transforms it."""
    pad, length = tokenizer.token_to_id("<fim_pad>"), row.shape[1]
    ids: list[int] = []
    text: list[int] = []
    for token in row[0].tolist():
        if token != EOS:
            text.append(token)
        elif text:
            ids += [*fim_text(text, tokenizer, random, rate), EOS]
            text = []
    ids += fim_text(text, tokenizer, random, rate)
    labels, mask = [*ids[1:], EOS], row[1].copy()
    mask[len(ids) :] = 0
    padding = [pad] * (length - len(ids))
    return np.array([(ids + padding)[:length], mask, (labels + padding)[:length]], np.int32)


def fim_text(ids: list[int], tokenizer: Any, random: Any, rate: float) -> list[int]:
    """One text's ids, transformed or not as chance wills."""
    if random.binomial(1, rate) == 0:
        return ids
    text = tokenizer.decode(ids, skip_special_tokens=False)
    cuts = [random.randint(0, len(text) + 1) for _ in range(2)]
    low, high = min(cuts), max(cuts)
    prefix, middle, suffix = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in (text[:low], text[low:high], text[high:])
    )
    pre, mid, suf, _ = map(tokenizer.token_to_id, MARKS)
    if random.binomial(1, 0.5) == 1:
        return [pre, suf, *suffix, mid, *prefix, *middle]
    return [pre, *prefix, suf, *suffix, mid, *middle]


def write(target: Path, rows: list[np.ndarray]) -> None:
    """A sequence file by h5py, gzip level 4, some hundred rows at a time."""
    shape = rows[0].shape
    with h5py.File(target, "w") as file:
        data = file.create_dataset("data", (len(rows), *shape), "i4", chunks=(1, *shape), compression="gzip")
        for start in range(0, len(rows), BATCH):
            data[start : start + BATCH] = np.stack(rows[start : start + BATCH])
        file.attrs["n_examples"] = len(rows)


def shuffle(files: Sequence[Path], out: Path, count: int) -> None:
    """All rows in one order, each read by itself from wherever it lies, into `count` files."""
    data = [h5py.File(path)["data"] for path in files]
    rows = [(number, row) for number, rows in enumerate(data) for row in range(len(rows))]
    order = np.random.default_rng(0).permutation(len(rows))
    for number, part in enumerate(np.array_split(order, count)):
        write(out / f"data-{number:05d}.h5", [data[file][row] for file, row in map(rows.__getitem__, part)])


def main(step: str, folder: str, out: str, *rest: str) -> None:
    """Do `step` on all files of `folder`."""
    target = Path(out)
    target.mkdir(parents=True)
    files = sorted(Path(folder).glob("*.h5"))
    if step == "fim":
        tokenizer, rate, epochs = rest
        for path in files:
            targets = [target / f"epoch_{epoch}" / path.name for epoch in range(int(epochs))]
            fim_file(path, targets, Tokenizer.from_file(tokenizer), float(rate))
    else:
        shuffle(files, target, int(*rest))


if __name__ == "__main__":
    main(*sys.argv[1:])
