"""The best checkpoint is the one of the lowest evaluation loss; patience ends a run; a resumed run decides the same.

Planted: the mark moved by any lower loss, however little -> the run does not stop at 6, fails; the count not taken up
from eval.jsonl -> the resumed run goes on, fails.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.training import flags
from support.distributed import run_on_ranks
from support.training_runs import metrics_of, tiny_config, tiny_weights, write_rows

REQUIRED = ["--data-path", "x", "--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", "1"]
REQUIRED += ["--train-iters", "1", "--lr", "1"]
# The losses of iterations 1, 2, ...: 3's is the lowest, but lower than 2's by too little to wait longer for.
SCRIPT = [5.0, 3.0, 2.9, float("nan"), 2.95, 2.92, 1.0]


def run_scripted(folder: Path) -> list[int]:
    """Iterations at which each of these runs ended."""
    from megatron.crystalcoder.training import loop

    calls = {"n": 0}

    def scripted(model: Any, sets: Any, config: Any) -> dict[str, float]:
        calls["n"] += 1
        return {"rows": SCRIPT[calls["n"] - 1]}

    loop.evaluate = scripted
    config = tiny_config(folder / "rows.jsonl", folder / "run", train_iters=20, save_interval=1)
    config = replace(
        config,
        eval_data=(config.data,),
        eval_interval=1,
        keep_best=True,
        early_stop_patience=4,
        early_stop_min_delta=0.2,
    )
    ended = [loop.train(config, initial_weights=tiny_weights()).iteration]  # type: ignore[arg-type]
    ended.append(loop.train(config, initial_weights=tiny_weights()).iteration)  # type: ignore[arg-type]
    calls["n"] = 0
    for iterations in (4, 20):
        parts = replace(config, save=folder / "parts", train_iters=iterations)
        ended.append(loop.train(parts, initial_weights=tiny_weights()).iteration)  # type: ignore[arg-type]
    return ended


def test_best_and_patience(tmp_path: Path) -> None:
    from megatron.crystalcoder.checkpoint.open import open_checkpoint
    from support.checkpoints import assert_same_tensors

    write_rows(tmp_path / "rows.jsonl")
    (ended,) = run_on_ranks(1, run_scripted, tmp_path)
    assert ended == [6, 6, 4, 6]
    for name in ("run", "parts"):
        assert [line["iteration"] for line in metrics_of(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
        best = open_checkpoint(tmp_path / name / "best")
        assert best.iteration == 3
        assert [path.name for path in (tmp_path / name / "best").glob("iter_*")] == ["iter_0000003"]
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("3")
        assert_same_tensors(tmp_path / name / "best", open_checkpoint(tmp_path / name).weights)
    lines = [json.loads(line) for line in (tmp_path / "parts/eval.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_they_need_an_evaluation() -> None:
    for flag in (["--keep-best"], ["--early-stop-patience", "3"]):
        with pytest.raises(InputError, match="need --valid-data-path and --eval-interval"):
            flags.parse([*REQUIRED, *flag])
