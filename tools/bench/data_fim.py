"""FIM on packed rows, whole commands, beside the straightforward way and the reference's speed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tools.bench import corpus, packed
from tools.bench.process import Cost, best_of, cost
from tools.bench.report import Table

# Rate, epochs, and MB of text (of all epochs) per CPU second of the reference, measured elsewhere with one process.
STAGES = {"stage 2": (0.9, 2, 1.04), "stage 3": (0.3, 3, 0.33)}
ROUNDS = 2  # of ours; best of them. The straightforward way takes long enough to be steady.
REPEATED = 4  # times the same rows, for the scaling: there start-up must not count


def measure() -> Table:
    """CPU and wall seconds and memory of each way, ours with one and two processes."""
    tokenizer = str(corpus.tokenizer_file())
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "rows"), Path(folder, "out")
        size = packed.pack(source)

        def ours(rate: float, epochs: int, processes: int, rounds: int = ROUNDS) -> Cost:
            return best_of(rounds, out, cost, "tools.cli", "data", "fim", str(source), "--out", str(out), "--tokenizer",
                           tokenizer, "--rate", str(rate), "--epochs", str(epochs), "--processes",
                           str(processes))  # fmt: skip

        def plain(rate: float, epochs: int, processes: int) -> Cost:
            return best_of(1, out, cost, "tools.bench.plain_rows", "fim", str(source), str(out), tokenizer, str(rate),
                           str(epochs))  # fmt: skip

        for stage, (rate, epochs, reference) in STAGES.items():
            base = 0.0
            for way, measured, processes in (("straightforward", plain, 1), ("here", ours, 1), ("here", ours, 2)):
                spent = measured(rate, epochs, processes)
                speed = size * epochs / spent.cpu
                base = base or speed
                seconds = f"{spent.cpu:.1f}", f"{spent.wall:.1f}", f"{spent.peak:.0f}"
                ratios = f"{speed:.2f}", f"{speed / base:.1f}", f"{speed / reference:.1f}"
                rows.append((f"{stage}: {rate}, {epochs} epochs", way, str(processes), *seconds, *ratios))
        packed.repeat(source, REPEATED)
        scaling = ours(0.9, 2, 1, 1).wall / ours(0.9, 2, 2, 1).wall
    return Table(
        "data_fim",
        "FIM on packed rows",
        f"{packed.TEXT}; a MB of text counts once for each epoch. Whole commands, start-up included, one thread a "
        f"process; best of {ROUNDS}. The straightforward way (once) decodes each text and encodes its parts, as the "
        "reference does, and writes by h5py. Peak is that of the largest process. The reference's speed, measured "
        f"elsewhere: {', '.join(f'{stage} {speed}' for stage, (*_, speed) in STAGES.items())} MB per CPU second. Two "
        f"processes on stage 2's rows {REPEATED} times over take {scaling:.2f} times less wall time than one.",
        ("job", "way", "processes", "CPU s", "wall s", "peak MB", "MB / CPU s", "ratio", "to the reference's"),
        rows,
    )
