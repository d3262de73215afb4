"""The checkpoint with the lowest evaluation loss, kept in <save>/best, and when to stop because it gets no lower.

Both follow from the run's eval.jsonl, so a resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron.crystalcoder.checkpoint.directory import iteration_directory
from megatron.crystalcoder.training.accounting import Accounting
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.metrics import EVAL_FILE, read_metrics
from megatron.crystalcoder.training.resume import Progress
from megatron.crystalcoder.training.run_state import save_run

BEST = "best"


class BestCheckpoint:
    """Follows the evaluation losses of a run. Every rank has one, and all decide what rank 0 does."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._best = math.inf
        self._mark = math.inf  # what patience compares with
        self._without_improvement = 0
        # MetricsLog has dropped the lines past the iteration that is resumed from.
        lines = read_metrics(config.save / EVAL_FILE) if config.save is not None and dist.get_rank() == 0 else []
        for loss in _from_rank_0([line["eval_loss"] for line in lines]):
            self._improves(loss)

    def _improves(self, loss: float) -> bool:
        """Count this loss; whether it is the lowest so far (one that is not finite never is)."""
        self._without_improvement += 1
        if loss < self._mark - self._config.early_stop_min_delta:
            self._mark, self._without_improvement = loss, 0
        if not loss < self._best:
            return False
        self._best = loss
        return True

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations in a row as `early_stop_patience` allows brought no improvement."""
        patience = self._config.early_stop_patience
        return patience > 0 and self._without_improvement >= patience

    def follow(
        self, losses: dict[str, float], progress: Progress, model: Any, optimizer: Any, account: Accounting
    ) -> None:
        """Take in an evaluation: save if it is the best so far, and say so if it was the last to wait for."""
        (loss,) = _from_rank_0([sum(losses.values()) / len(losses)])
        if self._improves(loss) and self._config.keep_best and self._config.save is not None:
            folder = self._config.save / BEST
            save_run(replace(self._config, save=folder), model, optimizer, progress, account)
            if dist.get_rank() == 0:
                for other in folder.glob("iter_*"):
                    if other != iteration_directory(folder, progress.iteration):
                        shutil.rmtree(other)
        if self.exhausted and dist.get_rank() == 0:
            print(
                f"stopping at iteration {progress.iteration}: the evaluation loss has not fallen below "
                f"{self._mark:.4f} for {self._without_improvement} evaluations",
                flush=True,
            )


def _from_rank_0(values: list[float]) -> list[float]:
    """Ranks may differ in the last bit, and must not in what they decide."""
    holder: list[Any] = [values]
    dist.broadcast_object_list(holder, src=0)
    told: list[float] = holder[0]
    return told
