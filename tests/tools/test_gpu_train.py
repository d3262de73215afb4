"""The GPU benchmark as a whole on a CPU: its checks, the measured step, its table and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from tools.bench import gpu_train
from tools.bench.breakdown import PARTS, attribute
from tools.bench.kernel_checks import SMALL, run_checks

# Kernels of torch's attention that a CPU has not.
CUDA_ALONE = {f"attention, {name}, forward and backward" for name in ("cudnn", "efficient")}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a CPU what it would on a GPU")


def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice into one document: the section is replaced."""
    document, record = tmp_path / "benchmarks.md", tmp_path / "gpu.json"
    document.write_text("# Benchmarks\n")
    flags = ["--device", "cpu", "--shapes", "tiny", "--budget", "60", "--out", str(document), "--json", str(record)]
    gpu_train.main(flags)
    timings = json.loads(record.read_text())["kernels"]
    assert {each["name"]: each["failure"] for each in timings if each["failure"]}.keys() <= CUDA_ALONE
    assert len(timings) == document.read_text().split("gpu_kernels -->")[1].count("\n| ") - 1
    assert all(each["seconds"] > 0 and each["flops"] + each["bytes"] > 0 for each in timings if not each["failure"])
    gpu_train.main([*flags, "--skip-checks"])
    assert capsys.readouterr().out.count(": ok\n") == len(list(run_checks(torch.device("cpu"), SMALL, compiled=False)))
    text = document.read_text()
    assert text.startswith("# Benchmarks\n\n<!-- gpu_train -->\n")
    assert text.count("<!-- gpu_train -->") == 1
    section = text.split("gpu_train -->")[1]
    header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == len(gpu_train.PRECISIONS)
    assert all(row.count("|") == header.count("|") for row in rows)
    found = json.loads(record.read_text())
    assert found["checks"] == []
    for each in found["measurements"]:
        assert not each["failure"]
        assert each["steps"] >= 3
        assert each["tokens_per_second"] == pytest.approx(4 * 64 / each["step_seconds"])
        assert set(each["parts"]) == {*PARTS, "idle"}
        assert all(each["parts"][part] > 0 for part in ("attention", "MLP", "norms", "loss", "optimizer"))
        assert 5 < each["loss"] < 8  # ln 512 = 6.2: a model that knows nothing


def test_a_wrong_kernel_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench import kernel_checks

    monkeypatch.setattr(kernel_checks, "swiglu", lambda x, compiled: x[..., : x.shape[-1] // 2].sigmoid())
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit) as end:
        gpu_train.main(f"--device cpu --shapes tiny --budget 0.001 --out {out} --json {tmp_path / 'gpu.json'}".split())
    assert end.value.code == 1
    assert "not swiglu in bfloat16, swiglu in float32" in out.read_text()
    assert "no time left" in out.read_text()


def test_backward_time_belongs_to_the_part_of_its_forward() -> None:
    """Planted: backward operations left to "rest", fails."""
    x, small, large = torch.randn(64, 64), torch.randn(64, 64), torch.randn(64, 4096)
    weights = [small.requires_grad_(), large.requires_grad_()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with torch.profiler.record_function("part of the step: attention"):
            hidden = x @ weights[0]
        with torch.profiler.record_function("part of the step: MLP"):
            out = hidden @ weights[1]
        out.backward(torch.ones_like(out))
    events: Any = profiler.events()
    found = attribute(events)
    products = [event for event in events if event.name == "aten::mm"]
    assert len(products) == 5  # forward 2, gradients 2 + 1: the input needs none
    assert found["attention"] > 0
    total = sum(event.self_cpu_time_total for event in products) / 1e6
    assert found["attention"] + found["MLP"] >= total


def test_settings_follow_the_memory() -> None:
    """The full model in the settings that fit, of large and of small GPUs."""
    config = gpu_train._config("full", "bf16", None)
    assert config.model.unpadded.num_parameters == 6_575_278_720
    assert config.model.ffn_hidden_size == 11008
    chosen = {}
    for gib in (1000, 140, 100, 20):
        fitting = gpu_train._fitting(config, gib << 30)
        states, offload = fitting.optimizer.states, fitting.speed.offload
        chosen[gib] = (fitting.micro_batch_size, fitting.parallel.recompute, states, offload)
    assert chosen[1000] == (8, "none", "fp32", False)
    assert chosen[140] == (2, "none", "fp32", False)
    assert chosen[100] == (1, "none", "bf16", False)
    assert chosen[20] == gpu_train.LADDER[-1]
    long = gpu_train._fitting(gpu_train._config("full", "bf16", 32768), 140 << 30)
    assert (long.global_batch_size, long.micro_batch_size, long.parallel.recompute) == (1, 1, "full")
    assert long.model.max_sequence_length == 32768
    for shape, layers in (("1", 1), ("8", 8)):
        assert gpu_train._config(shape, "fp8", None).model.num_layers == layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "3"], "--shapes 3: use some of 1, 8, full, tiny"),
        (["--precision", "fp16"], "--precision fp16: use some of bf16, fp8"),
        (["--shapes", ","], "--shapes: names nothing"),
        (["--budget", "0"], "--budget 0: must be above 0"),
        ([], "--device cuda: torch sees no GPU"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, InputError)):
        gpu_train.main(arguments if "--device" in message else ["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
