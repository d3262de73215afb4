"""Restarts by the launcher, with ranks that only tell how they were started: on one node, on two, and when not to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.crystalcoder.training.elastic import JobIsOver, next_attempt
from support.network import free_port

# Writes <attempt>.<rank>, waits for the other rank's, and then does what the test says for its attempt and rank.
RANK = """
import os, pathlib, sys, time
attempt, rank = os.environ["CRYSTALCODER_ATTEMPT"], os.environ["RANK"]
folder = pathlib.Path(sys.argv[1])
(folder / f"{{attempt}}.{{rank}}").touch()
while len(list(folder.glob(f"{{attempt}}.*"))) < 2:
    time.sleep(0.05)
{what}
"""


def launch(root: Path, folder: Path, what: str, *options: str) -> subprocess.Popen[str]:
    script = folder / "rank.py"
    script.write_text(RANK.format(what=what))
    command = [sys.executable, "-m", "megatron.crystalcoder.training.launch", *options, str(script), str(folder)]
    paths = os.pathsep.join([str(root / "Megatron-LM"), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_one_node(root: Path, folder: Path, what: str, *options: str) -> tuple[int, str, list[str]]:
    """Exit code, stderr, and which ranks were started."""
    run = launch(root, folder, what, "--standalone", "--nproc-per-node", "2", *options)
    _, err = run.communicate(timeout=120)
    return run.returncode, err, started(folder)


def started(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".py")


def node(number: int, port: int) -> list[str]:
    where = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "localhost", "--master-port", str(port)]
    return [*where, "--nproc-per-node", "1", "--max-restarts", "2"]


def test_a_killed_rank_is_started_again_with_all_others(repo_root: Path, tmp_path: Path) -> None:
    """The others, which would wait for ever, are not asked to finish; a helper of the dead one does not outlive it."""
    what = """
if attempt == '1':
    if rank == '1':
        import subprocess
        subprocess.Popen(['sleep', '1000'])  # holds stderr, which is read to its end below
        os.kill(os.getpid(), 9)
    time.sleep(1000)
"""
    code, err, ranks = on_one_node(repo_root, tmp_path, what, "--max-restarts", "1")
    assert code == 0, err
    assert ranks == ["1.0", "1.1", "2.0", "2.1"]
    assert err == "rank 1 ended with signal 9: going on from the last checkpoint (restart 1 of 1)\n"


@pytest.mark.parametrize(
    ("ending", "restarts", "attempts", "code"),
    [
        pytest.param("sys.exit(2)", "3", "1", 2, marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", "3", "1", 3, marks=pytest.mark.slow),
        pytest.param("sys.exit(143)", "3", "1", 143, marks=pytest.mark.slow),
        pytest.param("sys.exit(7)", "2", "3", 7, marks=pytest.mark.slow),
    ],
)
def test_when_not_to_restart(
    repo_root: Path, tmp_path: Path, ending: str, restarts: str, attempts: str, code: int
) -> None:
    """Bad input, divergence and SIGTERM would only come again, or were meant; anything else has a limit."""
    found, err, ranks = on_one_node(repo_root, tmp_path, ending, "--max-restarts", restarts)
    assert found == code, err
    assert max(ranks)[0] == attempts


def test_the_other_node_starts_again_too(repo_root: Path, tmp_path: Path) -> None:
    """Its rank hangs in the first attempt, as one does that waits for a dead peer over NCCL."""
    what = "if attempt == '1': sys.exit(7) if rank == '1' else time.sleep(1000)"
    port = free_port()
    nodes = [launch(repo_root, tmp_path, what, *node(number, port)) for number in (0, 1)]
    errors = [each.communicate(timeout=120)[1] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], errors
    assert started(tmp_path) == ["1.0", "1.1", "2.0", "2.1"]
    assert errors[0].startswith("another node starts its ranks again: going on")
    assert errors[1].startswith("rank 1 ended with exit code 7: going on")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_node_that_died_joins_again(repo_root: Path, tmp_path: Path, dead: int) -> None:
    """Its launcher and rank are killed together; the call is made again; the other node's rank notices."""
    other = 1 - dead
    what = f"""
if attempt == '1' and not (folder / 'died').exists():
    (folder / f'waits.{{rank}}').touch()
    while rank == '{dead}' or not (folder / 'died').exists(): time.sleep(0.1)
    sys.exit(1)
"""
    port = free_port()
    nodes = [launch(repo_root, tmp_path, what, *node(number, port)) for number in (0, 1)]
    while started(tmp_path) != ["1.0", "1.1", "waits.0", "waits.1"]:
        assert all(each.poll() is None for each in nodes), [each.communicate() for each in nodes]
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(nodes[dead].pid)], capture_output=True, text=True)
    for pid in [nodes[dead].pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "died").touch()
    again = launch(repo_root, tmp_path, what, *node(dead, port))
    for each in (nodes[other], again):
        _, err = each.communicate(timeout=200)
        assert each.returncode == 0, err


def test_attempts_are_counted_together() -> None:
    store = dist.PrefixStore("job", dist.TCPStore("localhost", free_port(), is_master=True))
    assert [next_attempt(store, 0), next_attempt(store, 0)] == [1, 1]  # two nodes begin
    assert next_attempt(store, 1) == 2  # one notices a death first
    assert next_attempt(store, 1) == 2  # the other joins it
    assert next_attempt(store, 0) == 2  # so does a launcher started anew
    store.set("crystalcoder/attempt", "over")
    with pytest.raises(JobIsOver):
        next_attempt(store, 2)
