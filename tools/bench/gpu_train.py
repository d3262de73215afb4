"""The training step on a GPU: are its kernels right and fast, how fast is it, what does it hold, where is time lost?

    python -m tools.bench.gpu_train --shapes 1,8,full --precision bf16,fp8

Everything measured is the trainer's own step (`build`, `start_step`, each read while the next one runs) on the 7B model
of params/phase1 cut to so many layers. Sequences are random tokens and weights are random: neither changes the speed.
On a machine without a GPU, `--device cpu --shapes tiny` goes through the same code. The record and the document are
written after each part; one that breaks says why in its row, and what does not fit the GPU is tried in less memory. The
exit code is 1 if a kernel is wrong or a measurement broke.

A GPU machine without network that has Python 3.12 and torch with CUDA and Triton: fetch the wheels elsewhere,

    pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 --platform any -d wheels -r tools/bench/gpu_wheels.txt

and there, in the repository with that folder:

    pip install --no-deps --no-index --find-links wheels -r tools/bench/gpu_wheels.txt
    PYTHONPATH=Megatron-LM:. python -m tools.bench.gpu_train

MFU counts 6 N + 12 L h s FLOPs per token, N all parameters of the model as published (padding does not count), and
no recomputation, over the GPU's dense bf16 peak (989 TFLOP/s for H100 and H200), for fp8 too. The FFN's 10,922 is
padded with zeros to a multiple of 128, as `--ffn-multiple-of 128` does: fp8 needs it, and bf16 is slow without.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from data_prep.errors import InputError, exit_on_bad_input
from megatron.crystalcoder import platform
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import Fp8, Speed
from megatron.crystalcoder.training.config import DataSettings, TrainConfig, WarmupDecay
from megatron.crystalcoder.training.memory import Layout, OptimizerStates, Recompute, Savings, rank_memory
from megatron.crystalcoder.training.params import load_params
from megatron.crystalcoder.training.plan import flops_per_token
from tools.bench.breakdown import PARTS, breakdown
from tools.bench.kernel_checks import SMALL, Check, Sizes, run_checks
from tools.bench.kernel_times import Timing, time_kernels
from tools.bench.report import DOCUMENT, Table, machine, one_line
from tools.bench.synthetic import TiledWeights, random_rows

if TYPE_CHECKING:
    from megatron.crystalcoder.training.step import StartedStep

PARAMS = Path(__file__).resolve().parents[2] / "params" / "phase1" / "params.yaml"
TINY = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_attention_heads=4, ffn_hidden_size=352, rotary_dim=8
)
SHAPES = ("1", "8", "full", "tiny")
PRECISIONS = ("bf16", "fp8")
# Every rank's FFN is padded to a multiple of this: --ffn-multiple-of.
FFN_MULTIPLE = 128
# Tokens per step: enough micro-batches that the optimizer weighs no more than it does in a real run.
STEP_TOKENS, TINY_STEP_TOKENS = 16 * 2048, 4 * 64
# What is tried in turn until it fits: sequences per micro-batch, recomputation, Adam's moments, offloading.
LADDER: tuple[tuple[int, Recompute, OptimizerStates, bool], ...] = (
    (8, "none", "fp32", False),
    (4, "none", "fp32", False),
    (2, "none", "fp32", False),
    (1, "none", "fp32", False),
    (1, "full", "fp32", False),
    (1, "none", "bf16", False),
    (2, "none", "8bit", False),
    (2, "full", "8bit", False),
    (1, "full", "8bit", False),
    (1, "full", "8bit", True),
)
_WARM_UP_STEPS, _MIN_STEPS, _MAX_STEPS = 2, 3, 20
_GIB = 1 << 30


@dataclass
class Measurement:
    """One shape in one precision. Times in seconds, memory in bytes; None where there is nothing to measure it with."""

    shape: str
    precision: str
    settings: str = ""
    parameters: int = 0
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_memory: int | None = None
    predicted_memory: int | None = None
    step_seconds: float | None = None
    steps: int = 0
    loss: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    failure: str = ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = _Parser(
        prog="python -m tools.bench.gpu_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument(
        "--shapes", default="1,8,full", help=f"layers of the 7B model, of {', '.join(SHAPES)}; default: 1,8,full"
    )
    top.add_argument("--precision", default=",".join(PRECISIONS), help=f"of {', '.join(PRECISIONS)}; default: all")
    top.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    top.add_argument("--seq-length", type=int, help="tokens of a sequence; default: 2048, 64 for tiny")
    top.add_argument("--budget", type=float, default=540, help="seconds for everything; what does not fit is left out")
    top.add_argument("--skip-checks", action="store_true", help="measure steps only, no kernels by themselves")
    top.add_argument(
        "--out", type=Path, default=DOCUMENT, help="the document that takes the table; default: docs/benchmarks.md"
    )
    top.add_argument(
        "--json", type=Path, default=Path("gpu_train.json"), help="everything measured; default: gpu_train.json"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, write. Exit codes: 1 a kernel is wrong or a measurement broke, 2 bad input."""
    with exit_on_bad_input():
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = parser().parse_args(given)
        shapes = _chosen("--shapes", options.shapes, SHAPES)
        precisions = _chosen("--precision", options.precision, PRECISIONS)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU: --device cpu --shapes tiny goes through the same code")
        if options.device == "cpu" and torch.cuda.is_available():
            raise InputError(
                "--device cpu: this machine has a GPU: hide it with CUDA_VISIBLE_DEVICES= to measure without"
            )
        if options.budget <= 0:
            raise InputError(f"--budget {options.budget:g}: must be above 0")
        if options.seq_length is not None and options.seq_length < 1:
            raise InputError(f"--seq-length {options.seq_length}: must be at least 1")
        began = time.monotonic()
        # Else the gaps between blocks of many sizes take memory that the full model needs.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        platform.initialize()
        if torch.cuda.is_available():
            take_first_memory()

        command = " ".join(["python -m tools.bench.gpu_train", *given])
        found = Found(command, _sizes(shapes), options.out, options.json)
        if not options.skip_checks:
            with found.stage("kernel checks"):
                check_kernels(found)
            with found.stage("kernel times"):
                # Half of the time is for the steps, however long the compiler takes for the pieces.
                found.timings += time_kernels(platform.device(), found.sizes, until=began + options.budget / 2)
        with found.stage("steps"):
            measure_all(found, shapes, precisions, options.seq_length, began + options.budget)
        for result in found.tables():
            print(result.markdown(), flush=True)
        platform.shutdown()
        left_out = ("", "out of memory", "no time left")
        wrong = not all(each.passed for each in found.checks)
        if found.broken or wrong or any(each.failure not in left_out for each in found.measured):
            raise SystemExit(1)


def take_first_memory() -> None:
    """Ask whether the driver maps memory piece by piece; where it does not (a sandbox), go on with whole blocks."""
    try:
        torch.zeros(1 << 22, device=platform.device())
    except RuntimeError as error:
        print(f"no expandable segments here: {one_line(error)}", flush=True)
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@dataclass
class Found:
    """Everything found so far, written after each part of it: a run that is cut short leaves what it had."""

    command: str
    sizes: Sizes
    out: Path
    json: Path
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # stages that ended before their end, and why

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What breaks in it is noted, and the next stage comes all the same."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it was: the rest is worth having
            traceback.print_exc()
            self.broken.append(f"{name}: {one_line(error)}")
        self.write()
        _free_memory()

    def write(self) -> None:
        """The record, and the document's sections."""
        record = {
            "date": str(date.today()),
            "machine": machine(),
            "command": self.command,
            "broken": self.broken,
            "checks": [
                {**asdict(each), "error": None if math.isnan(each.error) else each.error, "passed": each.passed}
                for each in self.checks
            ],
            "kernels": [asdict(each) for each in self.timings],
            "measurements": [asdict(each) for each in self.measured],
        }
        self.json.write_text(json.dumps(record, indent=1) + "\n")
        for each in self.tables():
            each.write(self.out)

    def tables(self) -> list[Table]:
        """One of the steps, one of the pieces of a layer if they were timed."""
        pieces = [kernel_table(self.timings, self.sizes, self.command)] if self.timings else []
        return [table(self.measured, self.checks, self.command, self.broken), *pieces]


def _chosen(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    for word in chosen:
        if word not in known:
            raise InputError(f"{flag} {word}: use some of {', '.join(known)}")
    if not chosen:
        raise InputError(f"{flag}: names nothing: use some of {', '.join(known)}")
    return chosen


def check_kernels(found: Found) -> None:
    """Every check, printed as it is done."""
    for check in run_checks(platform.device(), found.sizes, compiled=torch.cuda.is_available()):
        verdict = "ok" if check.passed else f"WRONG {check.failure}"
        print(
            f"{check.name:24} {check.dtype:9} off by {check.error:.1e} of {check.tolerance:.0e}: {verdict}", flush=True
        )
        found.checks.append(check)


def _sizes(shapes: list[str]) -> Sizes:
    return SMALL if shapes == ["tiny"] else Sizes()


def measure_all(
    found: Found, shapes: list[str], precisions: list[str], seq_length: int | None, deadline: float
) -> None:
    """Each shape in each precision, with its share of the time that is left; what fails says so in its row."""
    runs = [(shape, precision) for shape in shapes for precision in precisions]
    found.measured += [Measurement(shape, precision, failure="no time left") for shape, precision in runs]
    for number, result in enumerate(found.measured):
        left = deadline - time.monotonic()
        if left > 0:
            result.failure = ""
            try:
                configs = _fitting(_config(result.shape, result.precision, seq_length), _gpu_memory())
                measure_first_that_fits(result, configs, time.monotonic() + left / (len(runs) - number), deadline)
            except InputError as error:  # this GPU has no fp8, or the like
                result.failure = str(error).replace("|", "/")
            except Exception as error:  # noqa: BLE001 - the other measurements are worth having all the same
                traceback.print_exc()
                result.failure = one_line(error)
        print(f"{result.shape:5} {result.precision}: {_row(result)}", flush=True)
        found.write()
        _free_memory()


def measure_first_that_fits(result: Measurement, configs: list[TrainConfig], until: float, deadline: float) -> None:
    """`measure` in the first of these settings for which the memory is enough in fact, while there is time."""
    for config in configs:
        try:
            measure(result, config, until, deadline)
            return
        except torch.OutOfMemoryError:
            print(f"{result.shape:5} {result.precision}: out of memory with {_settings(config)}", flush=True)
        _free_memory()
        if time.monotonic() > deadline:
            break
    result.failure = "out of memory"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _config(shape: str, precision: str, seq_length: int | None) -> TrainConfig:
    """The shape's run, in settings that are still to be chosen by `_fitting`."""
    tiny = shape == "tiny"
    model = TINY if tiny else load_params(PARAMS).model_config()
    if shape not in ("tiny", "full"):
        model = replace(model, num_layers=int(shape))
    length = seq_length or (64 if tiny else 2048)
    batch = max(1, (TINY_STEP_TOKENS if tiny else STEP_TOKENS) // length)
    model = model.with_ffn_multiple_of(FFN_MULTIPLE)
    fp8: Fp8 = "off" if precision == "bf16" else "on" if torch.cuda.is_available() else "emulated"
    return TrainConfig(
        speed=Speed(fp8=fp8),
        model=replace(model, max_sequence_length=max(length, model.max_sequence_length)),
        data=DataSettings(order="single"),
        schedule=WarmupDecay(1e-4, 1e-4, 0, 1, "constant"),
        train_iters=1,
        micro_batch_size=1,
        global_batch_size=batch,
        seq_length=length,
        bf16=True,
    )


def _fitting(config: TrainConfig, memory: int | None) -> list[TrainConfig]:
    """In the settings of the ladder, from the first on that is predicted to fit 95% of so many bytes; at least in the
    last."""
    rungs = []
    for micro_batch, recompute, states, offload in LADDER:
        if config.global_batch_size % micro_batch == 0:
            config = replace(config, micro_batch_size=micro_batch, parallel=ParallelConfig(recompute=recompute))
            config = replace(config, optimizer=replace(config.optimizer, states=states))
            rungs.append(replace(config, speed=replace(config.speed, offload=offload)))
    fits = [memory is None or predicted_memory(each) < 0.95 * memory for each in rungs]
    return rungs[fits.index(True) if any(fits) else -1 :]


def predicted_memory(config: TrainConfig) -> int:
    """What `crystalcoder plan` says."""
    layout = Layout(micro_batch=config.micro_batch_size, recompute=config.parallel.recompute)
    micro_batches = config.global_batch_size // config.micro_batch_size
    return rank_memory(
        config.model,
        layout,
        seq_length=config.seq_length,
        micro_batches=micro_batches,
        bf16=config.bf16,
        savings=Savings(config.optimizer.states, config.speed.fp8 != "off", config.speed.offload),
    ).total


def _gpu_memory() -> int | None:
    return torch.cuda.get_device_properties(platform.device()).total_memory if torch.cuda.is_available() else None


def measure(result: Measurement, config: TrainConfig, until: float, deadline: float) -> None:
    """Fill in `result`: steps until `until` (at least 3, at most 20), then, before the deadline, one under the
    profiler."""
    from megatron.crystalcoder.data.loader import micro_batches, open_data
    from megatron.crystalcoder.data.prefetch import prefetched
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import num_micro_batches, start_step
    from megatron.crystalcoder.training.step_reader import reads_late

    result.settings = _settings(config)
    result.parameters = config.model.unpadded.num_parameters
    result.predicted_memory = predicted_memory(config) if torch.cuda.is_available() else None
    platform.initialize_model_parallel(config.parallel, config.seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        path = random_rows(Path(folder) / "rows.h5", config.model.vocab_size, config.seq_length)
        config = replace(config, data=replace(config.data, paths=(path,)))
        model, optimizer = build(config, Start("random weights", TiledWeights(config.model, platform.device())))
        rows, order = open_data(config.data, seq_length=config.seq_length, vocab_size=config.model.vocab_size)
        size = config.micro_batch_size
        data = micro_batches(rows, order, consumed_samples=0, micro_batch_size=size, dp_rank=0, dp_size=1)

        if torch.cuda.is_available():
            data = prefetched(data, depth=2 * num_micro_batches(config), pin=True)

        def start() -> StartedStep:
            return start_step(model, optimizer, data, config, lr=1e-4)

        with closing(data):
            for _ in range(_WARM_UP_STEPS):
                start().result()
            seconds, result.loss = _timed(start, until, late=reads_late(config, optimizer))
            result.steps, result.step_seconds = len(seconds), statistics.median(seconds)
            result.tokens_per_second = config.global_batch_size * config.seq_length / result.step_seconds
            peak = platform.peak_flops()
            if peak is not None:
                counted = flops_per_token(config.model.unpadded, config.seq_length)
                result.mfu = result.tokens_per_second * counted / peak
            result.peak_memory = platform.peak_memory_bytes()
            if time.monotonic() < deadline:
                try:
                    result.parts = breakdown(lambda: start().result(), model, seconds=result.step_seconds)
                except Exception:  # noqa: BLE001 - the speed is known all the same
                    traceback.print_exc()


def _timed(start: Callable[[], StartedStep], until: float, *, late: bool) -> tuple[list[float], float]:
    """Seconds of each step until then (at least 3, at most 20), and the last loss; read late as the trainer
    does on a GPU: a step while the next one runs."""
    started = [start()] if late else []
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _MIN_STEPS or (len(seconds) < _MAX_STEPS and time.monotonic() < until):
        started.append(start())
        loss = started.pop(0).result().lm_loss
        end = time.perf_counter()
        seconds.append(end - begin)
        begin = end
    for step in started:
        loss = step.result().lm_loss
    return seconds, loss


def _settings(config: TrainConfig) -> str:
    words = [f"{config.global_batch_size} x {config.seq_length}", f"micro-batch {config.micro_batch_size}"]
    if config.parallel.recompute != "none":
        words.append(f"{config.parallel.recompute} recompute")
    if config.optimizer.states != "fp32":
        words.append(f"moments in {config.optimizer.states}")
    if config.speed.offload:
        words.append("activations in the host's memory")
    return ", ".join(words)


def table(measured: list[Measurement], checks: list[Check], command: str, broken: Sequence[str] = ()) -> Table:
    """The section of the document. broken: stages that did not come to their end."""
    passed = sum(each.passed for each in checks)
    wrong = ", ".join(f"{each.name} in {each.dtype}" for each in checks if not each.passed)
    verdict = f"{passed} of {len(checks)} kernel checks against fp64 pass{': not ' + wrong if wrong else ''}. "
    verdict = "".join([verdict] * bool(checks) + [f"Broken off: {each}. " for each in broken])
    return Table(
        "gpu_train",
        "Training on a GPU",
        f"{verdict}The trainer's own step, median of those that were timed, optimizer included. MFU: "
        "6 N + 12 L h s FLOPs per token over the dense bf16 peak, recomputation not counted. Memory: highest allocated "
        "by torch, and what `crystalcoder plan` predicts. Shares of the step are from torch's profiler.",
        ("layers", "precision", "settings", "tokens / s", "MFU", "GiB", "predicted", "s / step", *PARTS, "idle"),
        [(each.shape, each.precision, each.settings, *_row(each)) for each in measured],
        command,
    )


def kernel_table(timings: list[Timing], z: Sizes, command: str) -> Table:
    """What the pieces of a layer take by themselves."""
    peak = platform.peak_flops()

    def row(each: Timing) -> tuple[str, ...]:
        if each.failure:
            return each.name, "", "", "", each.failure
        rate = each.flops / each.seconds
        return (
            each.name,
            f"{each.seconds * 1e3:.3f}",
            f"{rate / 1e12:.3g}" if each.flops else "",
            f"{rate / peak:.0%}" if each.flops and peak else "",
            f"{each.bytes / each.seconds / 1e9:,.0f}" if each.bytes else "",
        )

    return Table(
        "gpu_kernels",
        "Pieces of a layer on a GPU",
        f"Each by itself; {z.batch} x {z.seq:,} tokens, width {z.hidden:,}, FFN {z.ffn:,}, vocabulary {z.vocab:,}; "
        "median of ten. Attention's FLOPs are those under the causal mask; bytes are those that a pass must move.",
        ("piece", "ms", "TFLOP / s", "of bf16 peak", "GB / s"),
        [row(each) for each in timings],
        command,
    )


def _row(result: Measurement) -> tuple[str, ...]:
    if result.failure:
        return (result.failure, *[""] * (len(PARTS) + 5))
    total = sum(result.parts.values())
    shares = [f"{result.parts[part] / total:.0%}" if total else "" for part in (*PARTS, "idle")]
    return (
        f"{result.tokens_per_second:,.0f}",
        "" if result.mfu is None else f"{result.mfu:.1%}",
        f"{(result.peak_memory or 0) / _GIB:.1f}",
        "" if result.predicted_memory is None else f"{result.predicted_memory / _GIB:.1f}",
        f"{result.step_seconds:.3f}",
        *shares,
    )


if __name__ == "__main__":
    main()
