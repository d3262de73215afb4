"""Slurm and Ray do the same tasks to the same bytes, and their failures reach the one who launched."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import cluster
from data_prep.commands import main
from data_prep.create_hdf5_dataset import main as lmdata
from data_prep.engine import JOBS, LostTasks
from data_prep.errors import InputError
from data_prep.manifest import TASKS
from data_prep.sequences import SequenceWriter
from data_prep.verification import verify
from support.fake_slurm import install

SLURM = ["--engine", "slurm", "--engine-option", "partition=cpu", "--engine-option", "account=lab"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fake Slurm that is first on PATH."""
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'crystalcoder[cluster]'")
    install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "GRACE_SECONDS", 0.5)
    return tmp_path / "slurm"


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    for number in range(3):
        with SequenceWriter(tmp_path / f"in/examples_{number}_0.h5", 16) as writer:
            writer.write(np.full((20, 3, 16), number, np.int32))
    return tmp_path / "in"


def test_slurm_gives_the_same_bytes(
    slurm: Path, sequences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffling has two stages: two arrays, the second after the first. Paths are relative, as people type them."""
    shuffle = ["shuffle", "in", "--files", "2", "--processes", "2"]
    monkeypatch.chdir(tmp_path)
    main([*shuffle, "--out", "here"])
    main([*shuffle, "--out", "there", *SLURM, "--engine-option", "mem-per-cpu-gb=3"])
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    spill, collect = (slurm / "101.sh").read_text(), (slurm / "102.sh").read_text()
    for script, array in ((spill, "0-0%2"), (collect, "0-1%2")):
        stated = dict(re.findall(r"^#SBATCH --(\S+?)=(.*)$", script, re.MULTILINE))
        assert {name: stated[name] for name in ("array", "partition", "account", "mem-per-cpu", "time")} == {
            "array": array, "partition": "cpu", "account": "lab", "mem-per-cpu": "3G", "time": "24:00:00",
        }  # fmt: skip
        assert f"{sys.executable} -m datatrove.tools.launch_pickled_pipeline" in script
    assert "--dependency=afterok:101" in json.loads((slurm / "102.args").read_text())
    assert not any("dependency" in argument for argument in json.loads((slurm / "101.args").read_text()))


@pytest.mark.parametrize("compat", [[], ["--reference-compat"]])
def test_the_references_door_on_slurm(slurm: Path, tmp_path: Path, tokenizer_file: Path, compat: list[str]) -> None:
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / f"text/{name}.jsonl").write_text('{"text": "one “two” three"}\n' * 20)
    door = ["LMData", "--input_dir", str(tmp_path / "text"), "--encoder_file", str(tokenizer_file), "--eos_id", "2",
            "--max_seq_length", "16", "--use_ftfy", "True", "--processes", "2", *compat]  # fmt: skip
    lmdata([*door, "--output_dir", str(tmp_path / "here")])
    lmdata([*door, "--output_dir", str(tmp_path / "there"), *SLURM])
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    parameters = [json.loads(folder.pop("data_params.json", b"{}")) for folder in (here, there)]
    assert here == there
    assert parameters[0].get("post-process") == parameters[1].get("post-process")


def test_bad_input_on_slurm_is_one_line(slurm: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """Planted: no `failed.json` -> the launcher only knows that tasks are lost, fails."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    command = ["tokenize", str(tmp_path / "text"), "--tokenizer", str(tokenizer_file), "--max-seq-length", "16"]
    with pytest.raises(InputError, match=r"a\.jsonl:2: "):
        main([*command, "--out", str(tmp_path / "out"), *SLURM])
    assert (slurm / "101.cancelled").exists()
    (tmp_path / "text/a.jsonl").write_text('{"text": "good"}\n')
    main([*command, "--out", str(tmp_path / "out")])  # nothing was done: the folder is free again
    assert verify(tmp_path / "out") == []


def test_lost_jobs_are_taken_up(
    slurm: Path, sequences: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Jobs that die leave their logs and what was done; the same command, on any engine, goes on."""
    out = tmp_path / "out"
    (slurm / "broken").touch()
    shuffle = ["shuffle", str(sequences), "--files", "2", "--out"]
    with pytest.raises(LostTasks, match=r"3 tasks ended without a record .*see the logs in .*launch-0"):
        main([*shuffle, str(out), *SLURM])
    assert (out / TASKS / "launch-0/stage-0/launch_script.slurm").exists()
    (slurm / "broken").unlink()
    # An earlier launch's job is still there: its tasks must not be done twice.
    (slurm / "101.rc").unlink()
    (out / TASKS / JOBS).write_text('["101"]')
    waited = []

    def end_job(seconds: float) -> None:
        waited.append(seconds)
        (slurm / "101.rc").write_text("1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.time, "sleep", end_job)
        main([*shuffle, str(out)])
    assert len(waited) == 1
    assert "jobs 101 of an earlier launch go on" in capfd.readouterr().err
    main([*shuffle, str(tmp_path / "plain")])
    assert contents(out) == contents(tmp_path / "plain")


def test_refusals(sequences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle = ["shuffle", str(sequences), "--files", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--engine-option fast: is not name=value"):
        main([*shuffle, "--engine", "ray", "--engine-option", "fast"])
    with pytest.raises(InputError, match="belongs to --engine slurm or ray"):
        main([*shuffle, "--engine-option", "a=b"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datatrove", None)
        with pytest.raises(InputError, match=r"needs datatrove: pip install 'crystalcoder\[cluster\]'"):
            main([*shuffle, *SLURM])
    pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'crystalcoder[cluster]'")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(InputError, match="needs ray: pip install"):
            main([*shuffle, "--engine", "ray"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="there is no sbatch here"):
        main([*shuffle, *SLURM])
    assert not (tmp_path / "out").exists()


def test_slurm_refuses_the_job(slurm: Path, sequences: Path, tmp_path: Path) -> None:
    shuffle = ["shuffle", str(sequences), "--files", "2", "--out", str(tmp_path / "out"), "--engine", "slurm"]
    with pytest.raises(InputError, match="needs --engine-option partition=NAME"):
        main(shuffle)
    with pytest.raises(InputError, match="mem_per_cpu_gb=lots: is not a number"):
        main([*shuffle, "--engine-option", "partition=x", "--engine-option", "mem_per_cpu_gb=lots"])
    (slurm / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(InputError, match=r"sbatch refused the job \(exit 3\)"):
        main([*shuffle, "--engine-option", "partition=x"])


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path, sequences: Path, tokenizer_file: Path) -> None:
    """A real Ray cluster of this machine: every kind of step, and one with bad input."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'crystalcoder[cluster]'")
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {number} " * 50}) for number in range(40)]
        (tmp_path / f"text/{name}.jsonl").write_text("\n".join(lines))
    tokenizer = ["--tokenizer", str(tokenizer_file)]
    tokenize = ["tokenize", str(tmp_path / "text"), *tokenizer, "--max-seq-length", "64", "--shard-mb", "0"]
    ray = ["--engine", "ray", "--processes", "2", "--engine-option", "mem-per-cpu-gb=0.2"]
    for engine, options in (("local", []), ("ray", ray)):
        out = tmp_path / engine
        main([*tokenize, "--out", str(out / "tok"), *options])
        main(["fim", str(tmp_path / "local/tok"), "--out", str(out / "fim"), *tokenizer, "--rate", "0.9", *options])
        main(["shuffle", str(tmp_path / "local/fim"), "--out", str(out / "mixed"), "--files", "3", *options])
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    with (tmp_path / "text/b.jsonl").open("a") as file:
        file.write("\n{")
    with pytest.raises(InputError, match=r"b\.jsonl:41: "):
        main([*tokenize, "--out", str(tmp_path / "bad"), *ray])


@pytest.mark.slow
def test_a_running_ray_cluster_of_two_nodes(tmp_path: Path, sequences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached by its address, as an option and as RAY_ADDRESS; it goes on running. An address without one is named."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'crystalcoder[cluster]'")
    from ray.cluster_utils import Cluster

    shuffle = ["shuffle", str(sequences), "--files", "4", "--processes", "2"]
    ray = ["--engine", "ray", "--engine-option", "mem-per-cpu-gb=0.1"]
    main([*shuffle, "--out", str(tmp_path / "here")])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        main([*shuffle, "--out", str(tmp_path / "option"), *ray, "--engine-option", f"address={nodes.address}"])
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        main([*shuffle, "--out", str(tmp_path / "variable"), *ray])
    finally:
        nodes.shutdown()
    assert contents(tmp_path / "option") == contents(tmp_path / "variable") == contents(tmp_path / "here")
    with pytest.raises(InputError, match=r"--engine ray: no cluster at 127\.0\.0\.1:9 "):
        main([*shuffle, "--out", str(tmp_path / "none"), *ray, "--engine-option", "address=127.0.0.1:9"])
