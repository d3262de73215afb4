"""The straightforward way of `make bench BENCH=finetune` makes what it is compared with: equal documents and masks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from data_prep.sequences import SequenceFile
from finetune.prepare import PrepareOptions, prepare
from finetune.recipe import SourceSettings
from tools.bench.plain_finetune import SEQUENCE, main


def documents(rows: Iterable[np.ndarray], bos: int) -> Counter[tuple[bytes, bytes]]:
    """Tokens and mask of each document, cut before `<s>`; the filling at a row's end is left out."""
    found: Counter[tuple[bytes, bytes]] = Counter()
    for tokens, mask, _ in rows:
        used = int(np.flatnonzero(mask)[-1]) + 2  # the last trained label, and its token
        starts = np.flatnonzero(tokens[:used] == bos)
        for begin, end in zip(starts, [*starts[1:], used], strict=True):
            found[tokens[begin:end].tobytes(), mask[begin:end].tobytes()] += 1
    return found


def test_both_ways_make_the_same_documents(tmp_path: Path, tokenizer_file: Path, tokenizer) -> None:
    records = [
        {"instruction": f"Add {i} and {i + 1}", "input": "in Python" * (i % 2), "output": "x = 1\n" * (1 + i % 9)}
        for i in range(300)
    ]
    source, plain = tmp_path / "records.jsonl", tmp_path / "plain.h5"
    source.write_text("\n".join(map(json.dumps, records)))
    main(str(source), str(plain), str(tokenizer_file))
    options = PrepareOptions(max_seq_length=SEQUENCE, packing="best-fit")
    facts = prepare([SourceSettings(source)], tmp_path / "rows", tokenizer, options)
    with h5py.File(plain) as file, SequenceFile(tmp_path / "rows/data-00000.h5") as ours:
        theirs = documents(file["data"][:], tokenizer.bos_id)
        assert documents(ours.rows(), tokenizer.bos_id) == theirs
        assert file.attrs["tokens"] == facts["train"]["tokens"]
    assert theirs.total() == 300
