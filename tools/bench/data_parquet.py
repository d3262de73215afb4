"""Parquet to JSON lines beside pyarrow's rows dumped by json, and the reference's speed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import orjson
import pyarrow
import pyarrow.parquet

from tools.bench import corpus
from tools.bench.process import Cost, cost
from tools.bench.report import Table

MEGABYTES = 120
REFERENCE = 25.0  # MB of text per CPU second of the reference (pandas), measured elsewhere
ROUNDS = 3


def measure() -> Table:
    """CPU seconds of both ways, one process each, and of starting up alone."""
    with tempfile.TemporaryDirectory() as folder:
        source, empty, out = Path(folder, "in"), Path(folder, "empty"), Path(folder, "out")
        size = corpus.write_jsonl(corpus.code(), source, MEGABYTES) / 1e6
        for file in source.glob("*.jsonl"):
            texts = [orjson.loads(line)["text"] for line in file.open("rb")]
            columns = {"max_stars_count": [None, *range(1, len(texts))], "id": [*map(str, range(len(texts)))]}
            table = pyarrow.table({**columns, "content": texts})
            pyarrow.parquet.write_table(table, file.with_suffix(".parquet"), row_group_size=1000)
        empty.mkdir()
        pyarrow.parquet.write_table(table.slice(0, 1), empty / "0.parquet")

        def best(*command: str) -> Cost:
            costs = []
            for _ in range(ROUNDS):
                shutil.rmtree(out, ignore_errors=True)
                costs.append(cost(*command))
            return min(costs)

        ways = {
            "rows of pyarrow, json.dumps": lambda f: best("tools.bench.plain_data", "parquet", str(f), str(out)),
            "here": lambda f: best("tools.cli", "data", "parquet2jsonl", str(f), "--out", str(out)),
        }
        rows: list[tuple[str, ...]] = []
        base = 0.0
        for way, measured in ways.items():
            spent, start_up = measured(source), measured(empty).cpu
            net = size / (spent.cpu - start_up)
            base = base or net
            numbers = (
                f"{spent.cpu:.2f}",
                f"{start_up:.2f}",
                f"{spent.peak:.0f}",
                f"{size / spent.cpu:.0f}",
                f"{net:.0f}",
            )
            rows.append((way, *numbers, f"{net / base:.1f}", f"{size / spent.cpu / REFERENCE:.1f}"))
    return Table(
        "data_parquet",
        "Parquet to JSON lines",
        f"{size:.0f} MB of Python source in {corpus.FILES} files, three columns; one process, best of {ROUNDS}. "
        f"Start-up is the same command on one row. The reference (pandas) does {REFERENCE:.0f} MB per CPU second, "
        "measured elsewhere. Decoding parquet and writing the file take half of what is left.",
        ("way", "CPU s", "of it start-up", "peak MB", "MB / CPU s", "without start-up", "ratio", "to the reference's"),
        rows,
    )
