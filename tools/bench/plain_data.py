"""The straightforward way to do what the data commands do, for comparison; each documented library used as documented.

python -m tools.bench.plain_data tokenize FOLDER OUT TOKENIZER PROCESSES
python -m tools.bench.plain_data parquet FOLDER OUT
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

SEQUENCE, EOS, BATCH = 2048, 2, 512


def tokenize(task: tuple[Path, Path, str]) -> None:
    """One file: ftfy on each document, the tokenizer on each document, packed, gzipped by h5py."""
    import ftfy
    import h5py
    import numpy as np
    from tokenizers import Tokenizer

    source, target, tokenizer_file = task
    tokenizer = Tokenizer.from_file(tokenizer_file)

    def rows() -> Iterator[list[list[int]]]:
        stream: list[int] = []
        with source.open(encoding="utf-8") as lines:
            for line in lines:
                stream += [*tokenizer.encode(ftfy.fix_text(json.loads(line)["text"])).ids, EOS]
                start = 0
                for start in range(SEQUENCE, len(stream), SEQUENCE):
                    yield [stream[start - SEQUENCE : start], [1] * SEQUENCE, stream[start - SEQUENCE + 1 : start + 1]]
                stream = stream[start:]

    with h5py.File(target, "w") as file:
        shape, chunks = (0, 3, SEQUENCE), (1, 3, SEQUENCE)
        data = file.create_dataset("data", shape, "i4", maxshape=(None, 3, SEQUENCE), chunks=chunks, compression="gzip")
        batch: list[list[list[int]]] = []

        def write() -> None:
            data.resize(len(data) + len(batch), axis=0)
            data[len(data) - len(batch) :] = np.array(batch, np.int32)
            batch.clear()

        for row in rows():
            batch.append(row)
            if len(batch) == BATCH:
                write()
        if batch:
            write()


def parquet(source: Path, target: Path) -> None:
    """One file: its rows as Python objects, each dumped by json."""
    import pyarrow.parquet

    with target.open("w") as lines:
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches():
            for row in batch.to_pylist():
                lines.write(json.dumps({"text" if key == "content" else key: value for key, value in row.items()}))
                lines.write("\n")


def main(step: str, folder: str, out: str, *rest: str) -> None:
    """Do `step` on every file of `folder`."""
    Path(out).mkdir(parents=True)
    if step == "parquet":
        for source in sorted(Path(folder).glob("*.parquet")):
            parquet(source, Path(out, source.stem + ".jsonl"))
        return
    tokenizer_file, processes = rest
    tasks = [(path, Path(out, path.stem + ".h5"), tokenizer_file) for path in sorted(Path(folder).glob("*.jsonl"))]
    if int(processes) == 1:
        for task in tasks:
            tokenize(task)
    else:
        with multiprocessing.get_context("spawn").Pool(int(processes)) as pool:
            pool.map(tokenize, tasks, chunksize=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
