"""Shuffling, whole commands, beside the straightforward way, `cp` of the same bytes, and the reference's speed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import h5py

from tools.bench import packed
from tools.bench.process import Cost, best_of, cost, cost_of
from tools.bench.report import Table

REFERENCE = 1500.0  # rows per CPU second of the reference, measured elsewhere with one process
FILES = 8
REPEATED = 48  # times the same rows: a shuffle is of many, and its start-up must not count
ROUNDS = 3  # of ours and of cp


def measure() -> Table:
    """CPU and wall seconds and memory of each way, ours with one and two processes."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "rows"), Path(folder, "out")
        packed.pack(source)
        packed.repeat(source, REPEATED)
        files = sorted(source.glob("*.h5"))
        count = sum(len(h5py.File(path)["data"]) for path in files)
        size = sum(path.stat().st_size for path in files) / 1e6

        copied = best_of(ROUNDS, out, cost_of, "cp", "-RL", str(source), str(out))
        base = 0.0

        def row(way: str, processes: int, spent: Cost) -> tuple[str, ...]:
            speed = count / spent.cpu
            seconds = f"{spent.cpu:.2f}", f"{spent.wall:.2f}", f"{spent.peak:.0f}"
            ratio = f"{speed / base:.1f}" if base else ""
            return (way, str(processes), *seconds, f"{speed:,.0f}", ratio, f"{speed / REFERENCE:.1f}",
                    f"{spent.wall / copied.wall:.1f}")  # fmt: skip

        rows.append(row("cp", 1, copied))
        plain = best_of(1, out, cost, "tools.bench.plain_rows", "shuffle", str(source), str(out), str(FILES))
        base = count / plain.cpu
        rows.append(row("straightforward", 1, plain))
        walls = []
        for processes in (1, 2):
            spent = best_of(ROUNDS, out, cost, "tools.cli", "data", "shuffle", str(source), "--out", str(out),
                            "--files", str(FILES), "--processes", str(processes))  # fmt: skip
            rows.append(row("here", processes, spent))
            walls.append(spent.wall)
    return Table(
        "data_shuffle",
        "Shuffle",
        f"{packed.TEXT}, {REPEATED} times over: {count:,} rows, {size:.0f} MB as they lie, into {FILES} files; page "
        f"cache warm. Whole commands, start-up included; best of {ROUNDS}, the straightforward way (h5py, row by row) "
        "once. Peak is that of the largest process. Rows stay compressed, but are read and written twice, for bounded "
        f"memory. The reference's speed, measured elsewhere: {REFERENCE:,.0f} rows per CPU second. Two processes "
        f"take {walls[0] / walls[1]:.2f} times less wall time than one.",
        (
            "way",
            "processes",
            "CPU s",
            "wall s",
            "peak MB",
            "rows / CPU s",
            "ratio",
            "to the reference's",
            "wall to cp's",
        ),
        rows,
    )
