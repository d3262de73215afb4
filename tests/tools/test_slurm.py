"""The Slurm templates, run by bash as Slurm runs them, with an `srun` that starts the tasks of two nodes here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import distinct_weights, save_hf
from support.training_runs import SEQ, metrics_of, write_rows

SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
nodes = [
    subprocess.Popen(sys.argv[2:], env={{**os.environ, "SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """#!{python}
import pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3] == "node[1-2]"
    print("localhost\\nlocalhost")
else:
    pathlib.Path(__file__).with_name("said").write_text(" ".join(sys.argv[1:]))
"""
# In place of what a node runs: leaves its arguments, and ends as the test says.
NODE = """
import json, os, pathlib, sys
name = f"node_{os.environ['SLURM_NODEID']}"
pathlib.Path(os.environ["SEEN"], name).write_text(json.dumps(sys.argv[1:]))
sys.exit(int(os.environ["ENDS"]) if name == "node_1" else 0)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(source.format(python=sys.executable))
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }


def run(root: Path, name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """As Slurm does: a copy of the file, by the interpreter of its first line."""
    copy = Path(environment["PATH"].partition(":")[0]) / "slurm_script"
    shutil.copyfile(root / "tools/slurm" / name, copy)
    return subprocess.run(
        ["bash", str(copy), *arguments], env=environment, cwd="/", capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("ends", "requeued"), [(0, False), (143, True), (2, False)])
def test_each_node_gets_its_share_and_a_run_that_saved_is_requeued(
    repo_root: Path, tmp_path: Path, slurm: dict[str, str], ends: int, requeued: bool
) -> None:
    checkout, seen = tmp_path / "checkout", tmp_path / "seen"
    checkout.mkdir()
    seen.mkdir()
    (checkout / "node.py").write_text(NODE)
    (checkout / "rank_cmd_phase2.sh").write_text(f'exec {sys.executable} node.py "$@"\n')
    environment = {**slurm, "SLURM_SUBMIT_DIR": str(checkout), "SEEN": str(seen), "ENDS": str(ends)}
    done = run(repo_root, "finetune.sbatch", environment, "2", "4", "1", "logs")
    assert done.returncode == ends, done.stderr
    for node in ("0", "1"):
        arguments = json.loads((seen / f"node_{node}").read_text())
        assert arguments == [node, "2", "localhost", "24711", "2", "4", "1", "logs"]
    said = tmp_path / "bin" / "said"
    assert (said.read_text() == "requeue 4711") if requeued else not said.exists()


def test_pretraining_starts_the_launcher_on_each_node(repo_root: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    checkout, seen = tmp_path / "checkout", tmp_path / "seen"
    (checkout / ".venv/bin").mkdir(parents=True)
    seen.mkdir()
    python = checkout / ".venv/bin/python"
    python.write_text(f"#!{sys.executable}\n{NODE}")
    python.chmod(0o755)
    environment = {**slurm, "SLURM_SUBMIT_DIR": str(checkout), "SEEN": str(seen), "ENDS": "143"}
    done = run(repo_root, "pretrain.sbatch", environment, "--params", "my params.yaml", "--tp", "2")
    assert done.returncode == 143, done.stderr
    for node in ("0", "1"):
        arguments = json.loads((seen / f"node_{node}").read_text())
        options = dict(zip(arguments[2:14:2], arguments[3:14:2], strict=True))
        assert arguments[:2] == ["-m", "megatron.crystalcoder.training.launch"]
        assert options == {
            "--node-rank": node,
            "--nnodes": "2",
            "--nproc-per-node": "4",
            "--master-addr": "localhost",
            "--master-port": "24711",
            "--max-restarts": "3",
        }
        assert arguments[14:] == [
            *("Megatron-LM/pretrain_crystalcoder.py", "--params", "my params.yaml", "--tp", "2"),
        ]
    assert (tmp_path / "bin" / "said").read_text() == "requeue 4711"


@pytest.mark.parametrize("name", ["finetune.sbatch", "pretrain.sbatch"])
def test_slurm_reads_the_options(repo_root: Path, name: str) -> None:
    """sbatch takes `#SBATCH` lines up to the first command, and needs an interpreter in the first line."""
    lines = (repo_root / "tools/slurm" / name).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert lines[0].startswith("#!")
    assert {"--ntasks-per-node=1", "--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(options)
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.slow
def test_a_job_trains(repo_root: Path, tmp_path: Path, slurm: dict[str, str]) -> None:
    """The real script on two nodes of one rank each."""
    save_hf(tmp_path / "hf", distinct_weights(), shards=1)
    write_rows(tmp_path / "rows.jsonl")
    job = {
        "LOAD": str(tmp_path / "hf"),
        "SAVE": str(tmp_path / "run"),
        "DATA_PATH": str(tmp_path / "rows.jsonl"),
        "ITERS": "2",
        "GLOBAL_BATCH_SIZE": "8",
        "SEQ_LENGTH": str(SEQ),
    }
    environment = {**slurm, **job, "SLURM_SUBMIT_DIR": str(repo_root), "OMP_NUM_THREADS": "1"}
    done = run(repo_root, "finetune.sbatch", environment, "2", "1", "2", str(tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    assert [line["iteration"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "logs").glob("*.log")) == ["node_0.log", "node_1.log"]
