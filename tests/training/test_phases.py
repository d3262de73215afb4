"""Several phases by one command: in order, each from the weights of the one before, taken up where they were left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.training import phases
from support.distributed import run_on_ranks
from support.pretraining import SMALL, S, write_data
from support.training_runs import column, metrics_of


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("phases"))


def run(arguments: list[str], stop_in_step: int | None = None) -> str | None:
    """`crystalcoder pretrain` in this process; the refusal, if it refused. It dies in step `stop_in_step`, if given."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training import loop, pretrain

    done, real_step, real = 0, loop.start_step, (platform.initialize, platform.shutdown)

    def fatal_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == stop_in_step:
            raise KeyboardInterrupt
        return real_step(*args, **kwargs)

    loop.start_step = fatal_step
    platform.initialize = platform.shutdown = lambda: None  # type: ignore[assignment]
    try:
        options, chosen = pretrain.parse(arguments)
        pretrain.check_before_start(options, chosen, int(os.environ["WORLD_SIZE"]))
        pretrain.main(arguments)
    except InputError as error:
        return str(error)
    except KeyboardInterrupt:
        pass
    finally:
        loop.start_step = real_step
        platform.initialize, platform.shutdown = real
    return None


def arguments_for(repo_root: Path, data_root: Path, out: str, *more: str) -> list[str]:
    params = str(repo_root / "params/tiny")
    return ["--params", params, "--data_root", str(data_root), "--model_dir", str(data_root / out), *SMALL, *more]


def several(repo_root: Path, data_root: Path) -> dict[str, Any]:
    """All at once; and killed in phase 2 after a checkpoint, then started again; and one by one."""
    told = {"at once": run([*arguments_for(repo_root, data_root, "once"), "--phases", "1,2,3"])}
    parts = [*arguments_for(repo_root, data_root, "parts"), "--phases", "1,2,3"]
    run(parts, stop_in_step=12)  # phase 2's sixth; its third is saved
    phases_json = json.loads((data_root / "parts/phases.json").read_text())
    told["killed"] = [entry["steps"]["consumed"] for entry in phases_json["phases"]]
    run(parts)
    run([*arguments_for(repo_root, data_root, "single"), "--phases", "1"])
    run([*arguments_for(repo_root, data_root, "single"), "--phases", "2,3"])
    return told


@pytest.fixture(scope="module")
def finished(repo_root: Path, data_root: Path) -> dict[str, Any]:
    return run_on_ranks(1, several, repo_root, data_root)[0]


def test_the_phases_are_the_same_however_they_are_run(data_root: Path, finished: dict[str, Any]) -> None:
    """To the bit. Planted: phase 2 begun with new weights; a relaunch that begins phase 2 anew: each fails."""
    assert finished["at once"] is None
    assert finished["killed"] == [6, 3, 0]
    for number in (1, 2, 3):
        once = column(data_root / f"once/phase{number}", "lm_loss")
        assert len(once) == 6
        for other in ("parts", "single"):
            np.testing.assert_array_equal(column(data_root / other / f"phase{number}", "lm_loss"), once)
    assert column(data_root / "once/phase2", "lr")[0] == 0  # the schedule begins anew


def test_a_phase_begins_with_the_weights_alone(data_root: Path, finished: dict[str, Any]) -> None:
    last, first = metrics_of(data_root / "once/phase1")[-1], metrics_of(data_root / "once/phase2")[0]
    assert (first["iteration"], first["consumed_samples"]) == (1, 8)
    assert first["lm_loss"] < last["lm_loss"] + 3  # new weights start at 27
    record = vars(open_checkpoint(data_root / "once/phase2").args)
    assert record["phase"] == 2


def at_layouts(repo_root: Path, data_root: Path, steps: int, layouts: dict[str, list[str]]) -> list[str | None]:
    """Phases 1 to 3 at each layout of as many ranks as this process group has; the refusals."""
    common = [f"runconfig.max_steps={steps}", f"runconfig.checkpoint_steps={steps}", "--phases", "1,2,3"]
    return [run([*arguments_for(repo_root, data_root, out, *more), *common]) for out, more in layouts.items()]


def losses(data_root: Path, out: str) -> np.ndarray:
    return np.array([column(data_root / f"{out}/phase{number}", "lm_loss") for number in (1, 2, 3)])


def test_losses_of_all_phases_do_not_depend_on_the_layout(
    repo_root: Path, data_root: Path, finished: dict[str, Any]
) -> None:
    """Six steps of each phase at PP2, and on two data-parallel ranks, against one rank; the slow test goes further."""
    two = {"pp2": ["--pp", "2"], "dp2": ["--use-distributed-optimizer", "--micro-batch-size", "2"]}
    assert run_on_ranks(2, at_layouts, repo_root, data_root, 6, two)[0] == [None, None]
    for out in two:
        assert np.abs(losses(data_root, out) - losses(data_root, "once")).max() < 1e-4


@pytest.mark.slow
def test_twenty_steps_of_all_phases_at_four_layouts(repo_root: Path, data_root: Path) -> None:
    """The trajectory of 1 -> 2 -> 3 on one rank, at TP2, at TP2/PP2 with sequence parallelism, and at DP2, to 1e-4."""
    run_on_ranks(1, at_layouts, repo_root, data_root, 20, {"one": []})
    two = {"tp2": ["--tp", "2"], "dp2-long": ["--use-distributed-optimizer"]}
    four = {"tp2-pp2": ["--tp", "2", "--pp", "2", "--sequence-parallel"]}
    assert run_on_ranks(2, at_layouts, repo_root, data_root, 20, two)[0] == [None, None]
    assert run_on_ranks(4, at_layouts, repo_root, data_root, 20, four)[0] == [None]
    one = losses(data_root, "one")
    assert one.shape == (3, 20)
    for out in (*two, *four):
        difference = np.abs(losses(data_root, out) - one).max()
        print(f"{out}: {difference:.1e}")
        assert difference < 1e-4


@pytest.mark.slow
def test_the_command_on_ranks_survives_a_sigterm(repo_root: Path, data_root: Path) -> None:
    """Two ranks through the launcher, SIGTERM in phase 2: it saves, and the same command goes on there. Exports of each
    phase's checkpoints are complete at the end."""
    out = data_root / "ranks"
    command = [sys.executable, "-m", "tools.cli", "pretrain", *arguments_for(repo_root, data_root, "ranks")]
    command += ["--phases", "1,2", "--tp", "2", "--sequence-parallel", "--export-every", "2"]
    command += ["runconfig.max_steps=200", "runconfig.checkpoint_steps=100"]
    first = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not (out / "phase2/metrics.jsonl").is_file() or len(metrics_of(out / "phase2")) < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGTERM, told
    stopped = int((out / "phase2/latest_checkpointed_iteration.txt").read_text())
    assert 2 <= stopped < 200
    second = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=500)
    assert second.returncode == 0, second.stderr
    assert "phase 1: finished" in second.stdout
    assert f"starting from iteration {stopped} of {out / 'phase2'}" in second.stdout
    assert [line["iteration"] for line in metrics_of(out / "phase2")] == list(range(1, 201))
    for number in (1, 2):
        listed = json.loads((out / f"phase{number}/exports/exports.json").read_text())
        assert [(entry["iteration"], "error" in entry) for entry in listed] == [(200, False)]
        assert (out / f"phase{number}/exports/iter_0000200/config.json").is_file()
    whole = json.loads((out / "phases.json").read_text())
    assert whole["tokens"]["planned"] == whole["tokens"]["consumed"] == 2 * 200 * 8 * S


def test_tokens_of_each_phase_and_dataset_are_told(data_root: Path, finished: dict[str, Any]) -> None:
    """Planned and consumed, at the end alike, in the directory of all and in that of each phase."""
    for out in ("once", "parts"):
        whole = json.loads((data_root / out / "phases.json").read_text())
        assert whole["tokens"] == {"planned": 3 * 48 * S, "consumed": 3 * 48 * S}
        assert [entry["phase"] for entry in whole["phases"]] == [1, 2, 3]
        assert json.loads((data_root / out / "phase3/phases.json").read_text()) == whole
    third = whole["phases"][2]
    assert set(third["datasets"]) == {str(data_root / "data/code_fim_0.3"), f"{data_root}/data/prose 0.0-0.5"}
    for counts in third["datasets"].values():
        assert counts["planned"] == counts["consumed"] > 0
    assert sum(counts["planned"] for counts in third["datasets"].values()) == 48 * S
    assert len(json.loads((data_root / "single/phase1/phases.json").read_text())["phases"]) == 1


def test_files_and_numbers(repo_root: Path, tmp_path: Path) -> None:
    """A directory of either kind, a template; numbers of names; a wrong order is refused before a file is read."""
    seven = phases.several_phases("2,3", repo_root / "params", model_dir=tmp_path)
    assert [phase.number for phase in seven] == [2, 3]
    assert [phase.params.file.path.parent.name for phase in seven] == ["phase2", "phase3"]
    assert seven[1].checkpoint_path == seven[0].model_dir == tmp_path / "phase2"
    [one] = phases.several_phases("1", repo_root / "params/tiny/phase{n}.yaml")
    assert (one.params.file.path.name, one.model_dir, one.checkpoint_path) == ("phase1.yaml", Path("phase1"), None)
    assert phases.phase_number(Path("x/phase-3/params.yaml")) == 3
    assert phases.phase_number(Path("x/mine.yaml")) is None
    for numbers, message in (
        ("2,1", "phase 1 begins with the weights of phase 0, not of phase 2"),
        ("1,3", "phase 3 begins with the weights of phase 2, not of phase 1"),
        ("1,1", "name them in order"),
        ("1,x", "give the numbers of phases"),
        ("0", "give the numbers of phases"),
        ("4", "holds neither phase4.yaml nor phase4/params.yaml"),
    ):
        with pytest.raises(InputError, match=message):
            phases.several_phases(numbers, repo_root / "params")
    with pytest.raises(InputError, match="is a directory: give one file, or --phases"):
        phases.one_phase(repo_root / "params")
    with pytest.raises(InputError, match="with --phases give the directory"):
        phases.several_phases("1", repo_root / "params/tiny/phase1.yaml")
    same = tmp_path / "same"
    shutil.copytree(repo_root / "params/tiny", same)
    for number in (1, 2):
        path = same / f"phase{number}.yaml"
        path.write_text(path.read_text().replace(f"model_dir: phase{number}", "model_dir: same"))
    with pytest.raises(InputError, match=r"phase2.yaml:\d+: runconfig.model_dir same is phase 1's too"):
        phases.several_phases("1,2", same)


def refusals(repo_root: Path, data_root: Path) -> dict[str, str | None]:
    """Wrong ways through the phases that `several` has run."""
    tiny = repo_root / "params/tiny"
    common = ["--data_root", str(data_root), *SMALL]

    def single(number: int, start: str | None, *more: str) -> list[str]:
        given = ["--checkpoint_path", str(data_root / start)] if start else []
        out = ["--model_dir", str(data_root / "refused")]
        return ["--params", str(tiny / f"phase{number}.yaml"), *out, *given, *common, *more]

    stopped = data_root / "stopped"
    shutil.copytree(data_root / "single/phase1", stopped / "phase1")
    (stopped / "phase1/latest_checkpointed_iteration.txt").write_text("3")
    shutil.copytree(data_root / "once/phase2", data_root / "begun/phase2")
    begun, phase_2 = arguments_for(repo_root, data_root, "begun"), arguments_for(repo_root, data_root, "stopped")
    wider = ["model.hidden_size=256", "model.num_heads=8", "model.filter_size=684"]
    return {
        "skipped": run(single(3, "once/phase1")),
        "backwards": run(single(1, "once/phase3")),
        "no weights": run(single(2, None)),
        "unfinished": run(single(2, "stopped/phase1")),
        "unfinished, by number": run([*phase_2, "--phases", "2,3"]),
        "begun too early": run([*begun, "--phases", "1,2"]),
        "another shape": run(single(2, "once/phase1", *wider)),
        "left behind": str((data_root / "refused").exists()),
    }


def test_a_wrong_order_is_refused_before_anything_starts(
    repo_root: Path, data_root: Path, finished: dict[str, Any]
) -> None:
    told = run_on_ranks(1, refusals, repo_root, data_root)[0]
    for name, words in {
        "skipped": ["is of phase 1, but phase 3 begins with phase 2's last checkpoint"],
        "backwards": ["is of phase 3, but phase 1 begins with new weights"],
        "no weights": ["runconfig.is_pretrained_checkpoint True needs", "give phase 1's checkpoint", "phase2.yaml:99"],
        "unfinished": ["phase 1 stands at step 3 of 6"],
        "unfinished, by number": ["phase 1 stands at step 3 of 6"],
        "begun too early": ["phase 2 has begun, but phase 1", "stands at step 0 of 6"],
        "another shape": ["model.hidden_size=256", "the checkpoint records hidden_size 128, but 256 is asked for"],
    }.items():
        for word in words:
            assert word in str(told[name]), (name, told[name])
    assert told["left behind"] == "False"
