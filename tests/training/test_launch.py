"""The real scripts in real processes: two nodes, a SIGTERM, bad input, a run that diverges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.checkpoints import distinct_weights, save_hf
from support.dying_rank import write_dying_rank
from support.network import free_port
from support.training_runs import SEQ, metrics_of, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ (a model), huge/ (the same, overflowing), rows.jsonl, cut.jsonl (its end), short.jsonl (a row)."""
    folder = tmp_path_factory.mktemp("launch")
    weights = distinct_weights()
    save_hf(folder / "hf", weights, shards=1)
    weights["transformer.ln_f.weight"] = torch.full_like(weights["transformer.ln_f.weight"], 3e38)
    save_hf(folder / "huge", weights, shards=1)
    write_rows(folder / "rows.jsonl")
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "cut.jsonl").write_text("".join(lines[:6]) + lines[6][:100])
    row = {key: values[:-1] for key, values in json.loads(lines[2]).items()}
    (folder / "short.jsonl").write_text("".join([*lines[:2], json.dumps(row) + "\n"]))
    return folder


def start(
    root: Path,
    inputs: Path,
    save: Path,
    *,
    node: int = 0,
    nodes: int = 1,
    port: int = 0,
    tp: int = 1,
    pp: int = 1,
    **environment: str,
) -> subprocess.Popen[str]:
    """One call of rank_cmd_phase2.sh, with a small job's environment."""
    values = {
        "LOAD": str(inputs / "hf"),
        "SAVE": str(save),
        "DATA_PATH": str(inputs / "rows.jsonl"),
        "ITERS": "4",
        "GLOBAL_BATCH_SIZE": "8",
        "SEQ_LENGTH": str(SEQ),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    arguments = [str(node), str(nodes), "localhost", str(port or free_port()), *map(str, (tp, pp)), "2", f"{save}_logs"]
    return subprocess.Popen(
        ["bash", str(root / "rank_cmd_phase2.sh"), *arguments],
        env={**os.environ, **values},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_nodes_are_one_job(repo_root: Path, inputs: Path, tmp_path: Path) -> None:
    """Two calls of one rank each, TP2: neither could build its half alone. Node 0 tells, and its log keeps it."""
    port = free_port()
    nodes = [start(repo_root, inputs, tmp_path / "run", node=node, nodes=2, port=port, tp=2) for node in (0, 1)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert outputs[0][0].count("| loss ") == 4
    assert "| loss " not in outputs[1][0]
    assert [line["iteration"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run_logs/node_0.log").read_text() == outputs[0][0]
    assert list((tmp_path / "run_logs/tensorboard").glob("events.*"))
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "4"


@pytest.mark.slow
def test_the_sample_rows_at_two_layouts(repo_root: Path, shared: Path, tmp_path: Path) -> None:
    """20 steps with the script's own hyper-parameters on the reference's rows (their first 256 tokens)."""
    rows = [json.loads(line) for line in (shared / "data/instruct_sample_100.jsonl").read_text().splitlines()]
    cut = [json.dumps({key: values[:256] for key, values in row.items()}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(cut))
    where = {"LOAD": str(shared / "fixtures/hf_tiny"), "DATA_PATH": str(tmp_path / "rows.jsonl")}
    for name, size in (("one", 1), ("four", 2)):
        settings = {**where, "ITERS": "20", "SEQ_LENGTH": "256"}
        run = start(repo_root, tmp_path, tmp_path / name, tp=size, pp=size, **settings)
        out, err = run.communicate(timeout=900)
        assert run.returncode == 0, out + err
    one, four = (metrics_of(tmp_path / name) for name in ("one", "four"))
    assert [line["lr"] for line in one] == [line["lr"] for line in four]
    # lr 2e-4 to 2e-5 by a cosine, after a warm-up of a thousandth: the first step runs at 0.
    assert (one[0]["lr"], one[-1]["lr"]) == (0, pytest.approx(2.11e-5, rel=0.01))
    assert one[-1]["lm_loss"] < one[0]["lm_loss"] - 0.01
    worst = max(abs(a["lm_loss"] - b["lm_loss"]) for a, b in zip(one, four, strict=True))
    assert worst < 1e-4


def run_on_two_nodes(repo_root: Path, inputs: Path, save: Path, **environment: str) -> list[tuple[str, str]]:
    """TP2 over two nodes of one rank each, 6 steps, a checkpoint at every second; what each node printed."""
    port = free_port()
    environment = {"ITERS": "6", "EXTRA_ARGS": "--save-interval 2", **environment}
    nodes = [start(repo_root, inputs, save, node=node, nodes=2, port=port, tp=2, **environment) for node in (0, 1)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_a_rank_that_dies_is_replaced(repo_root: Path, inputs: Path, tmp_path: Path) -> None:
    """Node 1's rank is killed at step 4: both nodes go on from iteration 2, with the losses of a run without that."""
    run_on_two_nodes(repo_root, inputs, tmp_path / "whole")
    dying = write_dying_rank(tmp_path / "dying", rank=1, step=4)
    (out, err), (_, err_1) = run_on_two_nodes(repo_root, inputs, tmp_path / "run", PYTHONPATH=str(dying))
    assert (dying / "died").exists()
    assert "rank 1 ended with signal 9: going on from the last checkpoint (restart 1 of 3)" in err_1
    assert "going on from the last checkpoint (restart 1 of 3)" in err
    assert "starting from iteration 2 of" in out
    losses = [[line["lm_loss"] for line in metrics_of(tmp_path / name)] for name in ("whole", "run")]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_sigterm_saves(repo_root: Path, inputs: Path, tmp_path: Path) -> None:
    """SIGTERM to the script: the step is finished, saved, and the exit code says what ended it."""
    save = tmp_path / "run"
    run = start(repo_root, inputs, save, ITERS="100000", EXTRA_ARGS="--micro-batch-size 1")
    deadline = time.monotonic() + 300
    while not (save / "metrics.jsonl").is_file() or len(metrics_of(save)) < 2:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    told = run.communicate(timeout=300)
    assert run.returncode == 128 + signal.SIGTERM, told
    stopped = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert metrics_of(save)[-1]["iteration"] == stopped
    assert (save / f"iter_{stopped:07d}/.metadata").is_file()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DATA_PATH": "{inputs}/cut.jsonl"}, ["cut.jsonl:7", "JSON"]),
        pytest.param({"DATA_PATH": "{inputs}/short.jsonl"}, ["short.jsonl:3", "31", "32"], marks=pytest.mark.slow),
        pytest.param({"LOAD": "{inputs}/nothing"}, ["nothing", "checkpoint"], marks=pytest.mark.slow),
        pytest.param({"EXTRA_ARGS": "--no-such-flag"}, ["--no-such-flag"], marks=pytest.mark.slow),
        pytest.param({"GLOBAL_BATCH_SIZE": "7"}, ["7", "multiple"], marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_line(
    repo_root: Path, inputs: Path, tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    """Two ranks meet it, one speaks; no report of the launcher; nothing is written but the log."""
    environment = {key: value.format(inputs=inputs) for key, value in environment.items()}
    run = start(repo_root, inputs, tmp_path / "run", tp=2, **environment)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 2, out + err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err
    assert not (tmp_path / "run").exists()


def test_script_refuses_wrong_arguments(repo_root: Path) -> None:
    script = str(repo_root / "rank_cmd_phase2.sh")
    for arguments in (["0", "1", "localhost"], ["0", "1", "localhost", "29500", "two", "2", "1", "logs"]):
        run = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 1


def test_divergence_names_iteration_rank_and_rows(repo_root: Path, inputs: Path, tmp_path: Path) -> None:
    run = start(repo_root, inputs, tmp_path / "run", LOAD=str(inputs / "huge"), EXTRA_ARGS="--dataloader-type single")
    _, err = run.communicate(timeout=300)
    assert run.returncode == 3
    for word in ("iteration 1:", "rank 0", "rows [0, 1]", "--skip-nonfinite"):
        assert word in err
    assert "Traceback" not in err
    assert not (tmp_path / "run/latest_checkpointed_iteration.txt").exists()


def test_what_torch_will_rename_one_day_is_not_told_to_users() -> None:
    """Each resume and each TP 2 step said so; a FutureWarning of anything else still is."""
    told = "import warnings, megatron.crystalcoder\n" + "".join(
        f"warnings.warn_explicit('from {module}', FutureWarning, 'file.py', 1, module='{module}')\n"
        for module in ("torch.distributed.c10d_logger", "megatron.core.dist_checkpointing", "numpy")
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "from " in line] == ["file.py:1: FutureWarning: from numpy"]
