"""Conversations to masked rows, whole commands, beside the straightforward way; repeated text and text seen once."""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import orjson

from data_prep.errors import InputError
from finetune.prepare import PREPARE_FILE
from tools.bench import corpus
from tools.bench.process import Cost, cost
from tools.bench.report import Table

SEQUENCE = 2048
REPEATED = 150  # times Code Alpaca, each record numbered so that none is left out as a repetition
FUNCTIONS = 20_000
ROUNDS = 2  # of ours; best of them

Record = dict[str, Any]


def measure() -> Table:
    """CPU and wall seconds, memory and fill of each way."""
    data = Path(os.environ.get("CRYSTALCODER_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
    tokenizer = data / "crystalcoder_tokenizer.json"
    if not tokenizer.is_file():
        raise InputError(f"{tokenizer}: the benchmark needs it: name its folder's folder in CRYSTALCODER_SHARED")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source, out, plain = Path(folder, "records.jsonl"), Path(folder, "rows"), Path(folder, "rows.h5")
        alpaca = f"Code Alpaca {REPEATED} times, numbered"
        for name, records in (
            (alpaca, _repeated(data / "code_alpaca_2k.json")),
            ("functions, each once", _functions()),
        ):
            count = _write(records, source)
            base = cost("tools.bench.plain_finetune", str(source), str(plain), str(tokenizer))
            fill, trained = _look(plain)
            rows.append(_row(name, "straightforward", count, base, base, fill))
            for packing in ("best-fit", "concatenate"):
                spent = []
                for _ in range(ROUNDS):
                    shutil.rmtree(out, ignore_errors=True)
                    spent.append(
                        cost("tools.cli", "finetune", "prepare", str(source), "--out", str(out), "--tokenizer",
                             str(tokenizer), "--packing", packing, "--long", "drop", "--no-dedup")
                    )  # fmt: skip
                fill, ours = _look(out)
                if name == alpaca and ours != trained:
                    raise InputError(f"{packing}: {ours} trained tokens, {trained} in the straightforward way's rows")
                rows.append(_row(name, f"here, {packing}", count, min(spent), base, fill))
    return Table(
        "finetune",
        "Conversations to masked rows",
        f"Alpaca records as JSON lines to rows of {SEQUENCE}, CrystalChat's system prompt; whole commands, start-up "
        f"included, one process and thread; best of {ROUNDS}. The straightforward way, once: json and the tokenizer "
        "for each conversation, first-fit decreasing by a search through all rows, h5py's gzip. Functions are those of "
        "installed Python packages: the docstring asks, the source answers. On Code Alpaca all ways train the same "
        "number of tokens, checked. Peak is that of the process.",
        ("records", "way", "conversations", "CPU s", "wall s", "peak MB", "conversations / CPU min", "ratio", "fill"),
        rows,
    )


def _row(name: str, way: str, count: int, spent: Cost, base: Cost, fill: float) -> tuple[str, ...]:
    seconds = f"{spent.cpu:.1f}", f"{spent.wall:.1f}", f"{spent.peak:.0f}"
    return (
        name,
        way,
        f"{count:,}",
        *seconds,
        f"{60 * count / spent.cpu:,.0f}",
        f"{base.cpu / spent.cpu:.1f}",
        f"{fill:.2%}",
    )


def _write(records: Iterator[Record], path: Path) -> int:
    count = 0
    with path.open("wb") as file:
        for count, record in enumerate(records, start=1):  # noqa: B007 - the last number is how many there are
            file.write(orjson.dumps(record) + b"\n")
    return count


def _repeated(path: Path) -> Iterator[Record]:
    records = orjson.loads(path.read_bytes())
    for number in range(1, REPEATED + 1):
        for record in records:
            yield {**record, "instruction": f"{record['instruction']} ({number})"}


def _functions() -> Iterator[Record]:
    """Documented functions of installed packages: short enough that hardly one exceeds a row."""
    count = 0
    for text in corpus.code():
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError):  # templates, and files of other Pythons
            continue
        lines = text.splitlines()
        for node in nodes:
            if (
                isinstance(node, ast.FunctionDef)
                and (asked := (ast.get_docstring(node) or "").strip())
                and node.body[1:]
            ):
                answer = "\n".join(
                    lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[node.body[1].lineno - 1 : node.end_lineno]
                )
                yield {"instruction": asked, "input": "", "output": answer}
                count += 1
                if count == FUNCTIONS:
                    return


def _look(path: Path) -> tuple[float, int]:
    """How full the rows are, and their trained tokens."""
    if path.is_dir():
        facts = orjson.loads((path / PREPARE_FILE).read_bytes())["train"]
        return facts["fill"], facts["trained_tokens"]
    with h5py.File(path) as file:
        data = file["data"]
        trained = sum(int(data[begin : begin + 512, 1].sum()) for begin in range(0, len(data), 512))
        return float(file.attrs["tokens"] / (len(data) * SEQUENCE)), trained
