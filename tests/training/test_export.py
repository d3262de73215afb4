"""--export-every: Hugging Face exports beside a run that goes on, whatever becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.training import pretrain
from support.checkpoints import assert_same_tensors
from support.distributed import run_on_ranks
from support.pretraining import SMALL, S, V, write_data
from support.tiny_tokenizer import write_tiny_tokenizer
from support.training_runs import metrics_of


def run(arguments: list[str]) -> None:
    from megatron.crystalcoder import platform

    platform.initialize = platform.shutdown = lambda: None  # type: ignore[assignment] # the test's ranks have it
    pretrain.main(arguments)


def runs(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Checkpoints of steps 2, 4, 6 and 7, every second exported and the last; one export cannot be made at first."""
    blocked = folder / "run/exports"
    blocked.mkdir(parents=True)
    (blocked / ".iter_0000004.export").write_text("in the way")  # a file where a directory is to be made
    (blocked / ".iter_0000004.export.partial").write_text("too")
    run(arguments)
    told = {"first": json.loads((blocked / "exports.json").read_text())}
    for path in blocked.glob(".iter*"):
        path.unlink()
    run(arguments)  # nothing left to train; the missing export is made
    told["second"] = json.loads((blocked / "exports.json").read_text())
    return told


@pytest.fixture(scope="module")
def exported(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = write_data(tmp_path_factory.mktemp("export"))
    small = [each for each in SMALL if "steps=" not in each or "learning_rate" in each]
    arguments = ["--params", str(repo_root / "params/tiny/phase1.yaml"), "--data_root", str(folder)]
    write_tiny_tokenizer(folder / "tokenizer.json")
    arguments += ["--model_dir", str(folder / "run"), "--export-every", "2"]
    arguments += ["--export-tokenizer", str(folder / "tokenizer.json")]
    arguments += [*small, "runconfig.max_steps=7", "runconfig.checkpoint_steps=2"]
    return folder / "run", run_on_ranks(1, runs, arguments, folder)[0]


def test_a_failed_export_is_told_and_training_goes_on(exported: tuple[Path, dict[str, Any]]) -> None:
    """Planted: the child's failure not looked at: the list names an export that is not there, fails."""
    save, told = exported
    assert len(metrics_of(save)) == 7
    assert [(entry["iteration"], "error" in entry) for entry in told["first"]] == [(4, True), (7, False)]
    assert "\n" not in told["first"][0]["error"]
    assert [(entry["iteration"], "error" in entry) for entry in told["second"]] == [(4, False), (7, False)]
    assert told["second"][1]["consumed_tokens"] == 7 * 8 * S


def test_an_export_is_the_checkpoint(exported: tuple[Path, dict[str, Any]]) -> None:
    """Every tensor bit for bit, of the iteration it names; transformers' model loads it."""
    from CrystalCoder import CrystalCoderLMHeadModel

    save, _ = exported
    assert sorted(path.name for path in (save / "exports").iterdir()) == [
        "exports.json",
        "iter_0000004",
        "iter_0000007",
    ]
    for iteration in (4, 7):
        target = save / "exports" / f"iter_{iteration:07d}"
        assert_same_tensors(target, open_checkpoint(save, iteration=iteration).weights)
        assert (target / "tokenizer.json").is_file()
        facts = json.loads((target / "training.json").read_text())
        assert (facts["iteration"], facts["phase"], facts["consumed_tokens"]) == (iteration, 1, iteration * 8 * S)
    four, seven = (
        CrystalCoderLMHeadModel.from_pretrained(save / "exports" / name) for name in ("iter_0000004", "iter_0000007")
    )
    tokens = torch.randint(0, V, (1, 8))
    assert not torch.equal(four(tokens).logits, seven(tokens).logits)


def test_any_checkpoint_of_a_run_can_be_converted(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """`crystalcoder convert --iteration`, and what `inspect` tells of it."""
    from tools.convert import app

    save, _ = exported
    done = CliRunner().invoke(app, ["--from", str(save), "--to", str(tmp_path / "hf"), "--iteration", "2"])
    assert done.exit_code == 0, done.output
    assert_same_tensors(tmp_path / "hf", open_checkpoint(save, iteration=2).weights)
    told = CliRunner().invoke(app, ["inspect", str(save), "--iteration", "2"]).output
    assert "samples consumed          16" in told
    assert "written by" in told
    with pytest.raises(InputError, match="no such checkpoint: choose an iteration that is there \\(2, 4, 6, 7\\)"):
        open_checkpoint(save, iteration=3)
    with pytest.raises(InputError, match="has no iterations"):
        open_checkpoint(tmp_path / "hf", iteration=3)


def test_wrong_flags_are_refused(repo_root: Path, tmp_path: Path) -> None:
    params = ["--params", str(repo_root / "params/tiny/phase1.yaml")]
    for arguments, message in (
        (["--export-every", "0"], "--export-every 0: must be at least 1"),
        (["--export-tokenizer", str(tmp_path)], "needs --export-every"),
        (["--export-every", "1", "--export-tokenizer", str(tmp_path)], "is no tokenizer"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain.parse([*params, *arguments])
