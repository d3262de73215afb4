"""`--profile`: a trace of the chosen steps and no others, from the chosen ranks, and what cannot be chosen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, cast

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.training import flags
from megatron.crystalcoder.training.config import ProfileSettings, TrainConfig
from support.distributed import run_on_ranks
from support.training_runs import tiny_config, tiny_weights, write_rows

FLAGS = (
    "--data-path rows.jsonl --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 1e-3 "
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 172 --vocab-size 256"
)


def profiled(data: Path, settings: list[ProfileSettings], refused: list[ProfileSettings]) -> list[str]:
    """Runs of four steps; what the refused settings are told."""
    from megatron.crystalcoder.training.loop import train

    def run(each: ProfileSettings) -> None:
        train(tiny_config(data, train_iters=4, profile=each), initial_weights=cast(Any, tiny_weights()))

    for each in settings:
        run(each)
    told = []
    for each in refused:
        with pytest.raises(InputError) as caught:
            run(each)
        told.append(str(caught.value))
    return told


def iterations_in(trace: Path) -> dict[str, int]:
    """The step ranges of a chrome trace, and how many optimizer ranges lie in each."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    inner = [event for event in ranges if event["name"] == "optimizer"]
    return {
        step["name"]: sum(step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"] for e in inner)
        for step in ranges
        if step["name"].startswith("iteration")
    }


def test_traces_name_their_steps(tmp_path: Path) -> None:
    """Steps 2 and 3 on both ranks; the last step on rank 1, where more are asked for than there are.

    Planted: the step before the first one traced too, fails.
    """
    write_rows(tmp_path / "rows.jsonl")
    chosen = [ProfileSettings(2, 3, tmp_path / "both", None), ProfileSettings(4, 9, tmp_path / "one", frozenset({1}))]
    refused = [ProfileSettings(5, 6, tmp_path / "no"), ProfileSettings(1, 1, tmp_path / "no", frozenset({0, 2}))]
    [told, _] = run_on_ranks(2, profiled, tmp_path / "rows.jsonl", chosen, refused)
    both = sorted((tmp_path / "both").iterdir())
    assert [file.name for file in both] == [f"steps_2-3_rank_{rank}.json.gz" for rank in (0, 1)]
    for file in both:
        assert iterations_in(file) == {"iteration 2": 1, "iteration 3": 1}
        assert b"aten::" in gzip.decompress(file.read_bytes())
    [one] = (tmp_path / "one").iterdir()
    assert one.name == "steps_4-4_rank_1.json.gz"
    assert iterations_in(one) == {"iteration 4": 1}
    assert "step 5 is behind the run's last step, 4" in told[0]
    assert "there is no rank 2 among 2" in told[1]
    assert not (tmp_path / "no").exists()


def parse(text: str) -> TrainConfig:
    return flags.parse([*FLAGS.split(), *text.split()])


def test_flags() -> None:
    assert parse("").profile is None
    assert parse("--profile 3 --save runs/a").profile == ProfileSettings(3, 3, Path("runs/a/profile"), frozenset({0}))
    assert parse("--profile 2:4 --profile-dir t --profile-ranks 0,5").profile == ProfileSettings(
        2, 4, Path("t"), frozenset({0, 5})
    )
    assert parse("--profile 2:4 --profile-dir t --profile-ranks all").profile == ProfileSettings(2, 4, Path("t"), None)
    for text, message in (
        ("--profile 4:2 --profile-dir t", "--profile 4:2: give the first and the last step"),
        ("--profile 0:2 --profile-dir t", "--profile 0:2"),
        ("--profile ten --profile-dir t", "--profile ten"),
        ("--profile-dir t", "need --profile: add it"),
        ("--profile 1:2", "give --profile-dir"),
        ("--profile 1:2 --profile-dir t --profile-ranks 0,x", "--profile-ranks 0,x"),
    ):
        with pytest.raises(InputError, match=message):
            parse(text)
