"""Reading what steps tell: at once on a CPU; on a GPU one step late, so that the device never waits for the host.

A step that is not finite changes nothing, whoever knows of it when (see `optimizer.update`). Read late, one more step
has run when it is found, from the unchanged weights; both are forgotten, since the run ends there. What is evaluated or
saved has been read before. With --skip-nonfinite the run goes on, its count of Adam's steps must be right, and so every
step is read at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.data.order import Order
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.late import Copied
from megatron.crystalcoder.training.metrics import MetricsLog, StepFacts
from megatron.crystalcoder.training.optimizer import decides_on_device
from megatron.crystalcoder.training.resume import Progress
from megatron.crystalcoder.training.step import StartedStep, StepResult, num_micro_batches


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite; the message says at which iteration, rank and rows."""


@dataclass(frozen=True)
class _Unread:
    before: Progress
    after: Progress
    lr: float
    step: StartedStep
    stop: Copied
    params_norm: Copied | None


def reads_late(config: TrainConfig, optimizer: MegatronOptimizer) -> bool:
    """Whether this run reads each step while the next one runs. Raises InputError where it shall and cannot."""
    able = decides_on_device(optimizer)
    if config.read_losses == "late" and (config.skip_nonfinite or not able):
        remedy = "--skip-nonfinite" if config.skip_nonfinite else "what leaves out the fusion adamw"
        raise InputError(f"--read-losses late: a step left out must be known of before the next: drop {remedy}")
    wanted = config.read_losses == "late" or (config.read_losses == "auto" and platform.is_cuda())
    return wanted and able and not config.skip_nonfinite


class StepReader:
    """Takes in each step that was started, and reads it or the one before.

    stop_requested: whether a step that was read saw a SIGTERM on any rank. lm_loss: that of the last step read.
    """

    def __init__(self, config: TrainConfig, order: Order, log: MetricsLog, *, late: bool) -> None:
        self._config, self._order, self._log = config, order, log
        self._keeps = int(late)
        self._unread: list[_Unread] = []
        self.stop_requested = False
        self.lm_loss: float | None = None

    def add(
        self,
        step: StartedStep,
        before: Progress,
        after: Progress,
        *,
        lr: float,
        stop: Tensor,
        params_norm: Tensor | None = None,
    ) -> None:
        """Take in a step; stop: nonzero where a SIGTERM came. Raises NonFiniteError for the step it reads."""
        norm = None if params_norm is None else Copied(params_norm)
        self._unread.append(_Unread(before, after, lr, step, Copied(stop), norm))
        self._read(self._keeps)

    def read_all(self) -> None:
        """Wait for every step that was started. Raises NonFiniteError."""
        self._read(0)

    def _read(self, keep: int) -> None:
        while len(self._unread) > keep:
            each = self._unread.pop(0)
            result = each.step.result()
            if not result.updated and not self._config.skip_nonfinite:
                raise NonFiniteError(describe_non_finite(result, self._config, each.before, self._order))
            norm = None if each.params_norm is None else each.params_norm.read()[0]
            self._log.step(
                StepFacts(each.after.iteration, each.after.consumed_samples, result, each.lr, norm),
            )
            self.lm_loss = result.lm_loss
            self.stop_requested |= bool(each.stop.read()[0])


def describe_non_finite(result: StepResult, config: TrainConfig, progress: Progress, order: Order) -> str:
    """Which iteration, rank and rows to look at. `progress` is that before the step."""
    dp_size = parallel_state.get_data_parallel_world_size()
    size = config.micro_batch_size
    places = []
    for each in result.non_finite:
        micro = each.micro_batches or range(num_micro_batches(config))
        rows = [
            order.rows(
                progress.consumed_samples + number * size * dp_size,
                micro_batch_size=size,
                dp_rank=each.data_parallel_rank,
                dp_size=dp_size,
            ).tolist()
            for number in list(micro)[:8]
        ]
        what = "its loss" if each.micro_batches else f"the gradient of {each.parameter}"
        places.append(f"rank {each.rank}: {what}, from rows {', '.join(map(str, rows))}")
    return (
        f"iteration {progress.iteration + 1}: loss {result.lm_loss}, gradient norm {result.grad_norm} is not finite; "
        f"{'; '.join(places)}. It has changed no weight; the last checkpoint stands. Look at those rows, lower the "
        "learning rate, or pass --skip-nonfinite to leave such steps out"
    )
