"""One side of a tuning data set, training or validation: its encoded examples, then packed, shuffled and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.provenance import Span
from data_prep.sequences import SequenceWriter
from finetune.chat_format import Encoded
from finetune.packing import BestFitRows, PackedRows, Part, Rows
from finetune.recipe import repeated
from finetune.store import ExampleStore

ROWS_PER_FILE = 100_000
Packing = Literal["concatenate", "best-fit"]
Origin = tuple[int, int, int]  # of an example: its source, file and record, by number


@dataclass
class Side:
    """The stored examples, ready rows apart, and where each came from."""

    store: ExampleStore
    ready: ExampleStore
    origin: list[Origin] = field(default_factory=list)
    ready_origin: list[Origin] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path) -> Side:
        """An empty one that keeps its tokens in two files of this name."""
        return cls(ExampleStore(path), ExampleStore(path.with_name(f"{path.name}-ready")))

    def close(self) -> None:
        """Let go of the files."""
        self.store.close()
        self.ready.close()


class _Chosen:
    """The stored documents in the order and as often as they are packed."""

    def __init__(self, store: ExampleStore, order: NDArray[np.int64]) -> None:
        self._store, self.order = store, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        return self._store[int(self.order[index])]


def write_side(
    side: Side,
    folder: Path,
    epochs: Sequence[float],
    files: Sequence[str],
    rng: np.random.Generator,
    *,
    packing: Packing,
    seq_length: int,
    pad_id: int,
) -> dict[str, Any]:
    """Pack, shuffle and write a side's rows, each source's examples as often as `epochs` says; counts and statistics.

    files: the names behind the numbers in `side.origin`. pad_id: what fills rows up.
    """
    order = _order(side.origin, epochs, rng)
    ready = _order(side.ready_origin, epochs, rng)
    settings: dict[str, Any] = {"seq_length": seq_length, "pad_id": pad_id}
    lengths = side.store.lengths[order]
    documents = _Chosen(side.store, order)
    packed: Rows
    if packing == "concatenate":
        packed = PackedRows(documents, lengths=lengths, **settings)
    else:
        packed = BestFitRows(documents, lengths=lengths, **settings)
    total = len(packed) + len(ready)
    trained = 0
    shuffled = rng.permutation(total).tolist()

    def span(part: Part, origin: Sequence[Origin], number: int) -> Span:
        _, file, record = origin[number]
        return Span(files[file], record, part.start)

    for begin in range(0, total, ROWS_PER_FILE):
        with SequenceWriter(folder / f"data-{begin // ROWS_PER_FILE:05d}.h5", seq_length) as writer:
            for row in shuffled[begin : begin + ROWS_PER_FILE]:
                if row < len(packed):
                    planes = packed[row]
                    spans = [span(part, side.origin, int(order[part.document])) for part in packed.parts(row)]
                else:
                    number = int(ready[row - len(packed)])
                    planes = PackedRows([side.ready[number]], **settings)[0]
                    spans = [span(Part(0, 0), side.ready_origin, number)]
                trained += int(planes[1].sum())
                writer.write(planes[np.newaxis], [spans])
    tokens = int(lengths.sum()) + len(ready) * seq_length
    percentiles = np.percentile(lengths, (50, 90, 99, 100)).astype(int).tolist() if len(lengths) else [0] * 4
    return {
        "documents": len(order),
        "rows": total,
        "tokens": tokens,
        "trained_tokens": trained,
        "fill": round(tokens / (total * seq_length), 4) if total else 0.0,
        "document_tokens": dict(zip(("median", "p90", "p99", "longest"), percentiles, strict=True)),
    }


def _order(origin: Sequence[Origin], epochs: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of the examples as often as their sources are seen, source by source."""
    source_of = np.array([source for source, _, _ in origin], np.int64)
    chosen = [
        mine[repeated(len(mine), times, rng)]
        for number, times in enumerate(epochs)
        if len(mine := np.flatnonzero(source_of == number))
    ]
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)
