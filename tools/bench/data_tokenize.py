"""Tokenise and pack, whole commands, beside the straightforward way and the reference's speed; code and prose apart."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.bench import corpus
from tools.bench.process import Cost, cost
from tools.bench.report import Table

MEGABYTES = {"code": 40, "prose": 25}
SEQUENCE = 2048
# MB of text per CPU second of the reference (modelzoo 2.0.2's LMData, one process, measured elsewhere on two cores).
REFERENCE = {"code": 0.90, "prose": 0.69}
ROUNDS = 2  # of ours; best of them. The straightforward way takes long enough to be steady.
REPEATED = 16  # times the same files, for the scaling: there start-up must not count


def measure() -> Table:
    """CPU and wall seconds and memory of each way, with one and two processes."""
    tokenizer = str(corpus.tokenizer_file())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")

        def run(module: str, *arguments: str, rounds: int = 1) -> Cost:
            costs = []
            for _ in range(rounds):
                shutil.rmtree(out, ignore_errors=True)
                costs.append(cost(module, *arguments))
            return min(costs)

        def ours(source: Path, processes: int, rounds: int = ROUNDS) -> Cost:
            return run("tools.cli", "data", "tokenize", str(source), "--out", str(out), "--tokenizer", tokenizer,
                       "--processes", str(processes), rounds=rounds)  # fmt: skip

        def with_ftfy(source: Path, processes: int) -> Cost:
            return run("data_prep.create_hdf5_dataset", "LMData", "--input_dir", str(source), "--output_dir", str(out),
                       "--encoder_file", tokenizer, "--eos_id", "2", "--use_ftfy", "True", "--max_seq_length",
                       str(SEQUENCE), "--processes", str(processes), rounds=ROUNDS)  # fmt: skip

        def plain(source: Path, processes: int) -> Cost:
            return run("tools.bench.plain_data", "tokenize", str(source), str(out), tokenizer, str(processes))

        ways = {"straightforward, ftfy": plain, "here, ftfy": with_ftfy, "here": ours}
        for name, documents in (("code", corpus.code()), ("prose", corpus.prose())):
            source = Path(folder, name)
            size = corpus.write_jsonl(documents, source, MEGABYTES[name]) / 1e6
            base = 0.0
            for way, measured in ways.items():
                for processes in (1, 2):
                    spent = measured(source, processes)
                    base = base or size / spent.cpu
                    rows.append(_row(name, way, processes, size, spent, base, REFERENCE[name]))
            if name == "code":
                scaling = _scaling(source, ours)
    return Table(
        "data_tokenize",
        "Tokenise and pack",
        f"Installed Python sources ({MEGABYTES['code']} MB) and their documentation ({MEGABYTES['prose']} MB), each "
        f"text once; LLaMA vocabulary, sequences of {SEQUENCE}. Whole commands, start-up included, one thread a "
        f"process; best of {ROUNDS} (the straightforward way once: ftfy and the tokenizer on each document, h5py's "
        f"gzip). Peak is that of the largest process. The reference's speed, measured elsewhere with one process: "
        f"{REFERENCE['code']} MB per CPU second on code, {REFERENCE['prose']} on prose. Two processes on the code "
        f"{REPEATED} times over take {scaling:.2f} times less wall time than one.",
        ("text", "way", "processes", "CPU s", "wall s", "peak MB", "MB / CPU s", "ratio", "to the reference's"),
        rows,
    )


def _row(
    name: str, way: str, processes: int, size: float, spent: Cost, base: float, reference: float
) -> tuple[str, ...]:
    speed = size / spent.cpu
    seconds = f"{spent.cpu:.1f}", f"{spent.wall:.1f}", f"{spent.peak:.0f}"
    return name, way, str(processes), *seconds, f"{speed:.2f}", f"{speed / base:.1f}", f"{speed / reference:.1f}"


def _scaling(source: Path, ours: Callable[[Path, int, int], Cost]) -> float:
    """Wall time of one process over that of two, on the files many times over."""
    for file in sorted(source.glob("*.jsonl")):
        for copy in range(1, REPEATED):
            shutil.copy(file, file.with_name(f"{file.stem}_{copy}.jsonl"))
    return ours(source, 1, 1).wall / ours(source, 2, 1).wall
