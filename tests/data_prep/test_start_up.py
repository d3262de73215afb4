"""What a command loads, and how it makes its workers: a worker must not pay again what its parent has paid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs one `crystalcoder data` command and tells which modules are loaded then, and how workers were made.
PROBE = """
import json, sys
from data_prep import engine

methods, make = [], engine._context

def note():
    context = make()
    methods.append(context.get_start_method())
    return context

engine._context = note
from data_prep.commands import main
main(json.loads(sys.argv[1]))
print(json.dumps({"modules": sorted(sys.modules), "methods": methods}))
"""


def run(*arguments: str) -> tuple[set[str], list[str]]:
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return set(answer["modules"]), answer["methods"]


def test_help_loads_little() -> None:
    """Planted: `from data_prep.fim import FimSettings` at the top of commands.py -> numpy, fails."""
    modules, _ = run("--help")
    assert not modules & {"torch", "numpy", "h5py", "pyarrow", "pandas", "tokenizers", "transformers", "yaml"}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells a process's threads")
def test_workers_are_forked_with_the_tokenizer(tmp_path: Path, tokenizer_file: Path) -> None:
    """From a command; a process that has threads spawns them, with the same output.

    Planted: pyarrow imported in PieceCache.__init__ -> its thread is there before the fork, "spawn", fails; without
    `stay_one_thread` the threads of OpenBLAS are, where numpy has it.
    """
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.jsonl").write_text('{"text": "one two three"}\n' * 30)
    common = ["--tokenizer", str(tokenizer_file), "--max-seq-length", "16", "--shard-mb", "0", "--processes", "2"]
    modules, methods = run("tokenize", str(tmp_path / "in"), "--out", str(tmp_path / "forked"), *common)
    assert methods == ["fork"]
    assert "tokenizers" in modules
    assert not modules & {"torch", "pandas", "pyarrow", "transformers"}
    code = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    command = [sys.executable, "-c", code + PROBE]
    arguments = ["tokenize", str(tmp_path / "in"), "--out", str(tmp_path / "spawned"), *common]
    done = subprocess.run([*command, json.dumps(arguments)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["methods"] == ["spawn"]
    for path in sorted((tmp_path / "forked").iterdir()):
        assert path.read_bytes() == (tmp_path / "spawned" / path.name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells a process's threads")
def test_workers_of_a_second_stage_are_forked_too() -> None:
    """The threads of the first pool end a moment after it. Planted: `range(1)` for `range(100)` -> "spawn", fails."""
    code = """
from data_prep.engine import Task, _context, _results
for stage in range(20):
    print(_context().get_start_method(), len(list(_results(abs, [Task("a", 1), Task("b", 2)], 2))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("fork 2") >= 18  # on a machine with much else to do a thread may end later
