"""Stop and go on: same losses to the bit on the same layout, to rounding at another; what is refused; what is left out.

Planted: optimizer state read but not put back -> step 7 is NaN; data position not restored -> the loss of step 6 is off
by 0.31; schedule restarted -> the lr of step 6 is 0 and the loss of step 7 off by 0.028.
"""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import MuP, ParallelConfig
from megatron.crystalcoder.training.config import DataSettings
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.training_runs import column, metrics_of, tiny_config, tiny_weights, write_rows

DP2 = ParallelConfig(use_distributed_optimizer=True)
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
PP2_DO = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True)

SAME_LAYOUT: dict[str, dict[str, Any]] = {
    "torch_dist, DP2 distributed optimizer": {"parallel": DP2},
    "torch, DP2 distributed optimizer": {"parallel": DP2, "save_format": "torch"},
    "torch_dist, TP2": {"parallel": TP2},
    "torch, PP2": {"parallel": PP2, "save_format": "torch"},
    "torch_dist, PP2 bf16": {"parallel": PP2, "bf16": True},
    "torch, DP2 bf16 distributed optimizer": {"parallel": DP2, "save_format": "torch", "bf16": True},
}


def killed_and_resumed(data: Path, folder: Path) -> None:
    """Each case: 10 steps at once; and 10 steps that die in the eighth, with a checkpoint of the fifth, then go on."""
    for number, changes in enumerate(SAME_LAYOUT.values()):
        changes = {"save_interval": 5, **changes}
        train_here(data, folder / f"{number}-whole", **changes)
        die_in_step(8, data, folder / f"{number}-parts", **changes)
        if number < 2:
            keep_copy(folder / f"{number}-parts", folder / ("at-5", "torch-at-5")[number])
        train_here(data, folder / f"{number}-parts", **changes)


def train_here(rows_file: Path, save: Path, **changes: Any) -> Any:
    from megatron.crystalcoder.training.loop import train

    return train(tiny_config(rows_file, save, **changes), initial_weights=cast(Any, tiny_weights()))


def die_in_step(step: int, data: Path, save: Path, **changes: Any) -> None:
    from megatron.crystalcoder.training import loop

    done, real_step = 0, loop.start_step

    def fatal_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == step:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    loop.start_step = fatal_step
    try:
        train_here(data, save, **changes)
    except KeyboardInterrupt:
        pass
    finally:
        loop.start_step = real_step


def keep_copy(source: Path, target: Path) -> None:
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()


def resumed_on_one_rank(data: Path, folder: Path) -> None:
    """Data parallelism 2 -> 1, with the distributed optimizer, in both formats."""
    train_here(data, folder / "one rank", load=folder / "at-5", parallel=DP2)
    train_here(data, folder / "one rank, torch", load=folder / "torch-at-5", parallel=DP2)


def steps_left_out(data: Path, save: Path) -> str:
    """Weights whose logits overflow, with --skip-nonfinite: every step is left out. Then what it says again."""
    from megatron.crystalcoder.training.loop import train

    weights = tiny_weights()
    weights._weights["transformer.ln_f.weight"].fill_(3e38)
    config = tiny_config(data, save, train_iters=2, skip_nonfinite=True)
    train(config, initial_weights=cast(Any, weights))
    with redirect_stdout(StringIO()) as said:
        train(config)
    return said.getvalue()


def test_skip_nonfinite_leaves_steps_out(tmp_path: Path) -> None:
    """They count: the same call again has nothing left to do, and says so."""
    write_rows(tmp_path / "rows.jsonl")
    (said,) = run_on_ranks(1, steps_left_out, tmp_path / "rows.jsonl", tmp_path / "run")
    assert "nothing left to do: the run has 2 steps" in said
    lines = metrics_of(tmp_path / "run")
    assert [(line["iteration"], line["lm_loss"], line["skipped"]) for line in lines] == [
        (1, None, True),
        (2, None, True),
    ]
    weights = open_checkpoint(tmp_path / "run").weights
    original = tiny_weights().read("transformer.wte.weight")
    assert torch.equal(weights.read("transformer.wte.weight"), original)


def resumed_elsewhere(data: Path, folder: Path) -> dict[str, str]:
    """From the checkpoint of step 5 (torch_dist, DP2, distributed optimizer): other layouts, and what is refused."""
    start = folder / "at-5"
    for name, changes in {
        "other layout": {"parallel": PP2_DO},
        "other save": {"parallel": DP2},
        "no optimizer": {"parallel": TP2, "load_optimizer": False, "load_rng": False},
        "finetune": {"parallel": PP2, "finetune": True},
    }.items():
        train_here(data, folder / name, load=start, **cast(Any, changes))
    # A second start of the finetuning run goes on where it is: there is nothing left to do.
    assert train_here(data, folder / "finetune", load=start, parallel=PP2, finetune=True).lm_loss is None

    other_rows = data.with_name("other.jsonl")
    import torch.distributed as dist

    if dist.get_rank() == 0:
        write_rows(other_rows, count=24)
    dist.barrier()
    wider = tiny_config(data).model
    refusals = {
        "other data": {"parallel": DP2, "data": DataSettings(paths=(other_rows,), order="single")},
        "other order": {"parallel": DP2, "data": DataSettings(paths=(data,), order="shuffled")},
        "other optimizer": {"parallel": TP2},
        "other dtype": {"parallel": DP2, "bf16": True},
        "other muP": {"parallel": DP2, "model": type(wider)(**{**vars(wider), "mup": MuP(width_scale=0.5)})},
        "torch, other layout": {"parallel": PP2_DO, "load": folder / "1-whole"},
        "missing": {"parallel": DP2, "load": folder / "nothing", "exit_on_missing_checkpoint": True},
        "batch": {"parallel": DP2, "global_batch_size": 6},
        "heads": {"parallel": ParallelConfig(), "model": type(wider)(**{**vars(wider), "num_layers": 3})},
    }
    messages = {}
    for name, changes in refusals.items():
        try:
            train_here(data, folder / "refused", **cast(Any, {"load": start, **changes}))
        except InputError as error:
            messages[name] = str(error)
    messages["left behind"] = str((folder / "refused").exists())
    return messages


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("resume")
    data = folder / "rows.jsonl"
    # Not a divisor of the 40 samples before the checkpoint: there, a forgotten position would not show.
    write_rows(data, count=52)
    run_on_ranks(2, killed_and_resumed, data, folder)
    run_on_ranks(1, resumed_on_one_rank, data, folder)
    return folder, run_on_ranks(2, resumed_elsewhere, data, folder)[0]


@pytest.mark.parametrize("case", SAME_LAYOUT)
def test_bit_identical_on_the_same_layout(runs: tuple[Path, Any], case: str) -> None:
    number = list(SAME_LAYOUT).index(case)
    whole, parts = runs[0] / f"{number}-whole", runs[0] / f"{number}-parts"
    assert [line["iteration"] for line in metrics_of(parts)] == list(range(1, 11))
    for key in ("lm_loss", "grad_norm", "lr", "consumed_samples"):
        np.testing.assert_array_equal(column(parts, key), column(whole, key), err_msg=key)
    assert np.all(np.diff(column(parts, "elapsed_s")) > 0)
    assert (parts / "latest_checkpointed_iteration.txt").read_text() == "10"


def test_another_layout(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    whole = folder / "0-whole"
    for name in ("other layout", "other save", "one rank", "one rank, torch"):
        resumed = folder / name
        assert [line["iteration"] for line in metrics_of(resumed)] == [6, 7, 8, 9, 10]
        np.testing.assert_allclose(column(resumed, "lm_loss"), column(whole, "lm_loss")[5:], atol=1e-5, rtol=0)
        np.testing.assert_array_equal(column(resumed, "lr"), column(whole, "lr")[5:])
    np.testing.assert_array_equal(column(folder / "other save", "lm_loss"), column(whole, "lm_loss")[5:])


def test_what_is_left_behind(runs: tuple[Path, Any]) -> None:
    """--no-load-optim: the first loss (weights, rows) and the lr go on, the second loss shows the fresh moments.
    --finetune: everything but the weights starts over."""
    folder, _ = runs
    whole = column(folder / "0-whole", "lm_loss")
    fresh = metrics_of(folder / "no optimizer")
    assert fresh[0]["iteration"] == 6
    assert fresh[0]["consumed_samples"] == 48
    assert fresh[0]["lm_loss"] == pytest.approx(whole[5], abs=1e-5)
    assert abs(fresh[1]["lm_loss"] - whole[6]) > 1e-3
    np.testing.assert_array_equal([line["lr"] for line in fresh], column(folder / "0-whole", "lr")[5:])
    tuned = metrics_of(folder / "finetune")
    assert [line["iteration"] for line in tuned] == list(range(1, 11))
    np.testing.assert_array_equal([line["lr"] for line in tuned], column(folder / "0-whole", "lr"))
    assert tuned[0]["lm_loss"] < whole[0] - 0.1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other data", ["at-5", "other data", "--new-data-order"]),
        ("other order", ["at-5", "order", "--new-data-order"]),
        ("other optimizer", ["at-5", "with --use-distributed-optimizer", "--no-load-optim"]),
        ("other dtype", ["at-5", "fp32", "--no-load-optim"]),
        ("other muP", ["at-5", "mup", "0.25", "0.5"]),
        ("torch, other layout", ["1-whole", "TP 1", "PP 1", "--no-load-optim"]),
        ("missing", ["nothing", "checkpoint"]),
        ("batch", ["6", "multiple", "4"]),
        ("heads", ["num_layers", "3", "4"]),
    ],
)
def test_refused_in_one_line(runs: tuple[Path, Any], case: str, words: list[str]) -> None:
    messages = runs[1]
    assert "\n" not in messages[case]
    for word in words:
        assert word in messages[case]
    assert messages["left behind"] == "False"


def bytes_to_save(parallel: ParallelConfig) -> int:
    """Bytes of the optimizer's moments and weights that this rank holds while it saves, and all of them in the host."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training import run_state
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start

    platform.initialize_model_parallel(parallel)
    config = tiny_config(Path(), parallel=parallel)
    model, optimizer = build(config, Start("test", cast(Any, tiny_weights())))
    optimizer.prepare_grads()  # zeros: a first step makes the moments
    optimizer.step_with_ready_grads()
    states: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state.dist_checkpointing, "save", lambda state, *_, **__: states.append(state))
        run_state._save_torch_dist(Path(), {}, model, optimizer)
    parts = (states[0]["optimizer"]["param_state"] or {}).values()
    return sum(each.data.nbytes for part in parts for each in part.values())


def test_one_rank_gathers_the_moments() -> None:
    """megatron-core's usual way has all of them on every rank: 79 GB of the 7B model, eight times in a node's memory.

    Planted: that way, fails.
    """
    held = run_on_ranks(2, bytes_to_save, DP2)
    assert held[0] == 12 * TINY.num_parameters
    assert held[1] == 0


def test_random_states_of_another_kind_of_device_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator takes states of 16 bytes, a CPU's of 5056: megatron-core would set one of the wrong kind amid
    the first layer. Planted: set whatever was saved, fails."""
    from megatron.crystalcoder.training import run_state

    tracked: list[Any] = []
    tracker = SimpleNamespace(set_states=tracked.append)
    monkeypatch.setattr(run_state, "get_cuda_rng_tracker", lambda: tracker)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _: None)
    for saved_on_gpu in (False, True):
        for cuda in (False, True):
            monkeypatch.setattr(run_state.platform, "is_cuda", lambda cuda=cuda: cuda)
            gpu_state = torch.zeros(16, dtype=torch.uint8) if saved_on_gpu else None
            run_state._set_rng({"torch": torch.get_rng_state(), "cuda": gpu_state, "tracker": (saved_on_gpu, cuda)})
    assert tracked == [(False, False), (True, True)]


def test_checkpoint_records_the_model(runs: tuple[Path, Any]) -> None:
    for run in ("0-whole", "1-whole", "4-whole"):
        checkpoint = open_checkpoint(runs[0] / run)
        assert checkpoint.config == TINY
        assert checkpoint.mup_recorded
        assert not checkpoint.is_converted
        assert checkpoint.iteration == 10
    leftovers = [path.name for path in runs[0].glob("*/.*")]
    assert leftovers == []
    json.loads((runs[0] / "0-whole/metrics.jsonl").read_text().splitlines()[0])
