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
from tools.bench.kernel_checks import Check

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
    """A kernel that does not run at all, operands that cannot be made, a precision that this device has not, and a step
    that breaks, each with another kind of error. Planted: errors caught by kind, each loses the rest."""
    from tools.bench import kernel_checks, kernel_times

    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such | kernel\nand more")

    def unmade(*_: Any) -> Any:
        raise AssertionError

    def measure(result: Any, *_: Any) -> None:
        if result.precision == "fp8":
            raise InputError("no fp8 here")
        raise KeyError(7)

    monkeypatch.setattr(kernel_checks, "add_norm", broken)
    monkeypatch.setattr(kernel_times.Fp8Products, "gradient_operand", unmade)
    monkeypatch.setattr(gpu_train, "measure", measure)
    record, document = tmp_path / "gpu.json", tmp_path / "table.md"
    with pytest.raises(SystemExit) as end:
        gpu_train.main(f"--device cpu --shapes tiny --budget 60 --out {document} --json {record}".split())
    assert end.value.code == 1
    found = json.loads(record.read_text())
    assert [each["failure"] for each in found["measurements"]] == ["KeyError: 7", "no fp8 here"]
    failures = {each["name"]: each["failure"] for each in found["checks"] if each["failure"]}
    told = "NotImplementedError: no such / kernel and more"
    assert failures == {"residual + norm": told, "linear, fp8": "AssertionError:"}
    assert sum(each["passed"] for each in found["checks"]) == len(found["checks"]) - 3
    failures = {each["name"]: each["failure"] for each in found["kernels"] if each["name"] not in CUDA_ALONE}
    assert {name for name, failure in failures.items() if failure} == {
        "its input's gradient, fp8",
        "its weight's, fp8, added in fp32",
    }
    assert "| KeyError: 7 |" in document.read_text()


def test_what_was_found_is_written_when_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that breaks off is told, and the next one comes; a run that is killed leaves what it had.

    Planted: everything written at the end, fails.
    """

    def checks(*_: Any, **__: Any) -> Any:
        yield Check("one", "float32", 0.0, 1.0)
        raise ValueError("no memory for the second")

    def measure(result: Any, *_: Any) -> None:
        if result.precision == "fp8":
            raise KeyboardInterrupt
        result.tokens_per_second, result.step_seconds = 1234.0, 1.0  # and no profile

    monkeypatch.setattr(gpu_train, "run_checks", checks)
    monkeypatch.setattr(gpu_train, "time_kernels", lambda *_, **__: [])
    monkeypatch.setattr(gpu_train, "measure", measure)
    record, document = tmp_path / "gpu.json", tmp_path / "table.md"
    with pytest.raises(KeyboardInterrupt):
        gpu_train.main(f"--device cpu --shapes tiny --budget 60 --out {document} --json {record}".split())
    found = json.loads(record.read_text())
    assert found["broken"] == ["kernel checks: ValueError: no memory for the second"]
    assert [each["name"] for each in found["checks"]] == ["one"]
    assert [each["tokens_per_second"] for each in found["measurements"]] == [1234.0, None]
    assert [each["failure"] for each in found["measurements"]] == ["", "no time left"]
    text = document.read_text()
    assert "1 of 1 kernel checks against fp64 pass. Broken off: kernel checks: ValueError" in text
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "1,234" in rows[0]
    assert all(row.count("|") == header.count("|") for row in rows)


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
        fitting, *tighter = gpu_train._fitting(config, gib << 30)
        states, offload = fitting.optimizer.states, fitting.speed.offload
        chosen[gib] = (fitting.micro_batch_size, fitting.parallel.recompute, states, offload)
        predicted = [gpu_train.predicted_memory(each) for each in (fitting, *tighter)]
        assert gib == 20 or predicted[0] < 0.95 * (gib << 30)
        assert tighter or gib == 20
        assert predicted[-1] == min(predicted)
    assert chosen[1000] == (8, "none", "fp32", False)
    assert chosen[140] == (2, "none", "fp32", False)
    assert chosen[100] == (1, "none", "bf16", False)
    assert chosen[20] == gpu_train.LADDER[-1]
    long = gpu_train._fitting(gpu_train._config("full", "bf16", 32768), 140 << 30)[0]
    assert (long.global_batch_size, long.micro_batch_size, long.parallel.recompute) == (1, 1, "full")
    assert long.model.max_sequence_length == 32768
    for shape, layers in (("1", 1), ("8", 8)):
        assert gpu_train._config(shape, "fp8", None).model.num_layers == layers


def test_a_driver_without_mapped_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    gpu_train.take_first_memory()
    assert settings == []

    def zeros(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "zeros", zeros)
    gpu_train.take_first_memory()
    assert settings == ["expandable_segments:False"]
    assert "operation not supported" in capsys.readouterr().out


def test_what_does_not_fit_in_fact_is_tried_in_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first out of memory taken for the shape's result, fails."""
    tried: list[int] = []

    def measure(result: Any, config: Any, *_: Any) -> None:
        tried.append(config.micro_batch_size)
        if config.micro_batch_size > 2:
            raise torch.OutOfMemoryError
        result.tokens_per_second = 1.0

    monkeypatch.setattr(gpu_train, "measure", measure)
    configs = gpu_train._fitting(gpu_train._config("8", "bf16", None), None)
    for deadline, expected, failure in ((float("inf"), [8, 4, 2], ""), (0.0, [8], "out of memory")):
        tried.clear()
        result = gpu_train.Measurement("8", "bf16")
        gpu_train.measure_first_that_fits(result, configs, 0.0, deadline)
        assert (tried, result.failure) == (expected, failure)


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
