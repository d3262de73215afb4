"""The GPU benchmark as a whole on a CPU: its checks, the measured step, its table and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from tools.bench import gpu_train
from tools.bench.breakdown import PARTS, attribute

# Kernels of torch's attention that a CPU has not.
CUDA_ALONE = {f"attention, {name}, forward and backward" for name in ("cudnn", "efficient")}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a CPU what it would on a GPU")


def test_the_whole_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And again into the same document, without time: its section is replaced."""
    document, record = tmp_path / "benchmarks.md", tmp_path / "gpu.json"
    document.write_text("# Benchmarks\n")
    flags = ["--device", "cpu", "--shapes", "tiny", "--out", str(document), "--json", str(record), "--budget"]
    gpu_train.main([*flags, "60"])
    found, text = json.loads(record.read_text()), document.read_text()
    assert capsys.readouterr().out.count(": ok\n") == len(found["checks"]) > 12
    assert {each["name"]: each["failure"] for each in found["kernels"] if each["failure"]}.keys() <= CUDA_ALONE
    for each in found["kernels"]:
        assert each["failure"] or (each["seconds"] > 0 and each["flops"] + each["bytes"] > 0)
    assert len(found["kernels"]) == text.split("gpu_kernels -->")[1].count("\n| ") - 1
    assert text.startswith("# Benchmarks\n\n<!-- gpu_train -->\n")
    header, _, *rows = [line for line in text.split("gpu_train -->")[1].splitlines() if line.startswith("|")]
    assert len(rows) == len(gpu_train.PRECISIONS)
    assert all(row.count("|") == header.count("|") for row in rows)
    for each in found["measurements"]:
        assert not each["failure"]
        assert each["steps"] >= 3
        assert each["tokens_per_second"] == pytest.approx(4 * 64 / each["step_seconds"])
        assert set(each["parts"]) == {*PARTS, "idle"}
        assert all(each["parts"][part] > 0 for part in ("attention", "MLP", "norms", "loss", "optimizer"))
        assert 5 < each["loss"] < 8  # ln 512 = 6.2: a model that knows nothing

    gpu_train.main([*flags, "0.001", "--skip-checks"])
    text = document.read_text()
    assert text.count("<!-- gpu_train -->") == 1
    assert "no time left" in text
    assert json.loads(record.read_text())["checks"] == []


def test_a_wrong_kernel_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench import kernel_checks

    monkeypatch.setattr(kernel_checks, "swiglu", lambda x, compiled: x[..., : x.shape[-1] // 2].sigmoid())
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit) as end:
        gpu_train.main(f"--device cpu --shapes tiny --budget 0.001 --out {out} --json {tmp_path / 'gpu.json'}".split())
    assert end.value.code == 1
    assert "not swiglu in bfloat16, swiglu in float32" in out.read_text()
    assert "no time left" in out.read_text()


def test_what_breaks_is_told_beside_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not run at all, a precision that this device has not, and a step that breaks."""
    from tools.bench import kernel_checks

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    def measure(result: Any, *_: Any) -> None:
        if result.precision == "fp8":
            raise InputError("no fp8 here")
        broken()

    monkeypatch.setattr(kernel_checks, "add_norm", broken)
    monkeypatch.setattr(gpu_train, "measure", measure)
    record = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as end:
        gpu_train.main(f"--device cpu --shapes tiny --budget 60 --out {tmp_path / 'table.md'} --json {record}".split())
    assert end.value.code == 1
    found = json.loads(record.read_text())
    assert [each["failure"] for each in found["measurements"]] == ["no such kernel", "no fp8 here"]
    assert {each["failure"] for each in found["checks"] if each["name"] == "residual + norm"} == {"no such kernel"}
    assert sum(each["passed"] for each in found["checks"]) == len(found["checks"]) - 2


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


@pytest.mark.parametrize("late", [False, True])
def test_each_step_is_read_once(late: bool) -> None:
    """Late, as on a GPU, a step is read when the next one has been started; the last loss is the last step's."""
    events: list[str] = []

    def start() -> Any:
        number = events.count("start") + 1
        events.append("start")

        def result() -> Any:
            events.append(f"read {number}")
            return SimpleNamespace(lm_loss=float(number))

        return SimpleNamespace(result=result)

    seconds, loss = gpu_train._timed(start, 0.0, late=late)
    assert len(seconds) == 3
    assert loss == events.count("start") == (4 if late else 3)
    reads = [event for event in events if event != "start"]
    assert reads == [f"read {number + 1}" for number in range(int(loss))]
    assert events[:3] == (["start", "start", "read 1"] if late else ["start", "read 1", "start"])
