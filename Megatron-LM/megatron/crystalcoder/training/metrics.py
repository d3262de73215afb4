"""What a run tells about itself: metrics.jsonl and eval.jsonl in the save directory, TensorBoard, one log line a step.

metrics.jsonl has one object per iteration. A resumed run continues it: lines past the iteration it resumes from (of
steps whose checkpoint was never finished) are dropped first, so no iteration stands in it twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.crystalcoder import platform
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.plan import flops_per_token
from megatron.crystalcoder.training.step import StepResult

METRICS_FILE = "metrics.jsonl"
EVAL_FILE = "eval.jsonl"


@dataclass(frozen=True)
class StepFacts:
    """What the loop knows of one finished step."""

    iteration: int
    consumed_samples: int
    result: StepResult
    lr: float
    params_norm: float | None = None


class MetricsLog:
    """A context manager on every rank; rank 0 alone writes."""

    def __init__(self, config: TrainConfig, *, resumed_iteration: int) -> None:
        self.config, self.active = config, dist.get_rank() == 0
        self._metrics: Any = None
        self._evaluations: Any = None
        self._tensorboard: Any = None
        self._step_seconds: deque[float] = deque(maxlen=100)
        self._elapsed_before = 0.0
        if not self.active:
            return
        if config.save is not None:
            config.save.mkdir(parents=True, exist_ok=True)
            kept = _keep_lines_until(config.save / METRICS_FILE, resumed_iteration)
            self._elapsed_before = kept[-1]["elapsed_s"] if kept else 0.0
            _keep_lines_until(config.save / EVAL_FILE, resumed_iteration)
            self._metrics = open(config.save / METRICS_FILE, "a")  # noqa: SIM115 - closed by __exit__
            self._evaluations = open(config.save / EVAL_FILE, "a")  # noqa: SIM115
        if config.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(config.tensorboard_dir),
                max_queue=config.tensorboard_queue_size,
                purge_step=resumed_iteration + 1 if resumed_iteration else None,
            )
        self._started = self._last = time.perf_counter()

    def step(self, facts: StepFacts) -> None:
        """Record one iteration."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._step_seconds.append(seconds)
        config = self.config
        tokens_per_second = config.global_batch_size * config.seq_length / seconds
        line = {
            "iteration": facts.iteration,
            "consumed_samples": facts.consumed_samples,
            "consumed_tokens": facts.consumed_samples * config.seq_length,
            "lm_loss": _finite(facts.result.lm_loss),
            "grad_norm": _finite(facts.result.grad_norm),
            "lr": facts.lr,
            "lr_hidden": facts.lr * config.optimizer.hidden_lr_scale,
            "tokens_per_second": tokens_per_second,
            "mfu": self._mfu(tokens_per_second),
            "peak_memory_bytes": platform.peak_memory_bytes(),
            "data_wait_s": facts.result.data_wait_s,
            "elapsed_s": self._elapsed_before + now - self._started,
        }
        if not facts.result.updated:
            line["skipped"] = True
        if facts.params_norm is not None:
            line["params_norm"] = facts.params_norm
        if self._metrics is not None:
            print(json.dumps(line), file=self._metrics, flush=True)
        self._to_tensorboard(line, seconds)
        if facts.iteration % config.log_interval == 0 or facts.iteration == config.train_iters:
            print(self._log_line(line), flush=True)

    def evaluation(self, iteration: int, losses: dict[str, float]) -> None:
        """Record the mean token loss of each evaluation set. The time it took is not counted as a step's."""
        if not self.active:
            return
        self._last = time.perf_counter()
        mean = sum(losses.values()) / len(losses)
        if self._evaluations is not None:
            line = {"iteration": iteration, "eval_loss": mean, "losses": losses}
            print(json.dumps(line), file=self._evaluations, flush=True)
        if self._tensorboard is not None:
            for name, loss in {"mean": mean, **losses}.items():
                self._tensorboard.add_scalar(f"eval_loss/{name}", loss, iteration)
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"evaluation at iteration {iteration}: loss {mean:.4f} ({told})", flush=True)

    def restart_clock(self) -> None:
        """Leave out of the next step's time what happened since the last one (saving a checkpoint)."""
        self._last = time.perf_counter()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._metrics, self._evaluations, self._tensorboard):
            if file is not None:
                file.close()

    def _mfu(self, tokens_per_second: float) -> float | None:
        given = self.config.peak_tflops
        peak = platform.peak_flops() if given is None else given * 1e12
        if peak is None:
            return None
        achieved = tokens_per_second * flops_per_token(self.config.model.unpadded, self.config.seq_length)
        return achieved / (peak * dist.get_world_size())

    def _log_line(self, line: dict[str, Any]) -> str:
        total = self.config.train_iters
        remaining = (total - line["iteration"]) * sum(self._step_seconds) / len(self._step_seconds)
        parts = [
            f"iteration {line['iteration']:>{len(str(total))}}/{total}",
            f"loss {_number(line['lm_loss'], '.4f')}",
            f"grad norm {_number(line['grad_norm'], '.3f')}",
            f"lr {line['lr']:.3e}",
            f"{line['tokens_per_second']:,.0f} tok/s",
        ]
        if line["mfu"] is not None:
            parts.append(f"MFU {100 * line['mfu']:.1f}%")
        parts.append(f"peak memory {line['peak_memory_bytes'] / 2**30:.2f} GiB")
        parts.append(f"data wait {line['data_wait_s']:.3f} s")
        if "params_norm" in line:
            parts.append(f"params norm {line['params_norm']:.3f}")
        parts.append(f"ETA {_duration(remaining)}")
        if "skipped" in line:
            parts.append("SKIPPED (not finite)")
        return " | ".join(parts)

    def _to_tensorboard(self, line: dict[str, Any], seconds: float) -> None:
        if self._tensorboard is None:
            return
        left_out = {"iteration", "elapsed_s", "skipped"} | (set() if self.config.log_memory else {"peak_memory_bytes"})
        scalars = {key: value for key, value in line.items() if key not in left_out}
        if self.config.log_timers:
            scalars["iteration_seconds"] = seconds
        for key, value in scalars.items():
            if value is not None:
                self._tensorboard.add_scalar(key, value, line["iteration"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _keep_lines_until(path: Path, iteration: int) -> list[dict[str, Any]]:
    """Rewrite the file without the lines past `iteration`, at once or not at all; return what is kept."""
    kept = [line for line in read_metrics(path) if line["iteration"] <= iteration]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)
    return kept


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
