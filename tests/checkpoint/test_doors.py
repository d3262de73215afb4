"""The two command lines: Megatron's flags, and `crystalcoder convert`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from megatron.crystalcoder.checkpoint.open import open_checkpoint
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from tools import convert as command


def _util(repo_root: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    util = repo_root / "Megatron-LM/tools/checkpoint/util.py"
    return subprocess.run([sys.executable, util, *arguments.split()], capture_output=True, text=True, check=False)


def test_the_reference_command_lines(tmp_path: Path, repo_root: Path, shared: Path) -> None:
    there = _util(
        repo_root,
        "--model-type GPT --loader crystalcoder_hf --saver megatron --target-tensor-parallel-size 2 "
        f"--target-pipeline-parallel-size 4 --load-dir {shared}/fixtures/hf_tiny --save-dir {tmp_path}/meg",
    )
    assert there.returncode == 0, there.stderr
    assert len(list((tmp_path / "meg/iter_0000001").glob("mp_rank_0[01]_00[0123]/model_optim_rng.pt"))) == 8
    back = _util(
        repo_root,
        f"--model-type GPT --loader megatron --saver crystalcoder_hf --load-dir {tmp_path}/meg "
        f"--save-dir {tmp_path}/hf2 --max-queue-size=5 --hf-config-path CrystalCoder",
    )
    assert back.returncode == 0, back.stderr
    source = open_checkpoint(shared / "fixtures/hf_tiny")
    assert_same_tensors(tmp_path / "hf2", source.weights)
    # The packaged config.json is the 7B model's: a template, not this model's constants.
    assert open_checkpoint(tmp_path / "hf2").config == source.config
    assert (tmp_path / "hf2/tokenizer.json").is_file()


def test_flags_are_honoured_or_refused(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_from_file_location("util", repo_root / "Megatron-LM/tools/checkpoint/util.py")
    assert spec is not None
    assert spec.loader is not None
    util = module_from_spec(spec)
    spec.loader.exec_module(util)
    hf = save_hf(tmp_path / "hf", distinct_weights())
    base = f"--model-type GPT --loader crystalcoder_hf --saver megatron --load-dir {hf} --save-dir {tmp_path}/out"
    for wrong, message in (
        ("--use-magic", "unrecognized arguments: --use-magic"),
        ("--hf-config-path CrystalCoder", "--hf-config-path belongs to --saver crystalcoder_hf"),
        ("--true-vocab-size 32000", "has 256 rows, not the 32000"),
        ("--loader megatron", "use --loader crystalcoder_hf"),
        ("--target-tensor-parallel-size 3", "does not divide the attention heads"),
    ):
        with pytest.raises(SystemExit) as stop:
            util.main(f"{base} {wrong}".split())
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    good = (
        "--true-vocab-size 256 --save-format torch_dist --dtype bfloat16 --no-checking --target-tensor-parallel-size 2"
    )
    util.main(f"{base} {good}".split())
    assert_same_tensors(tmp_path / "out", {name: x.bfloat16() for name, x in distinct_weights().items()})


def test_crystalcoder_convert_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    with pytest.raises(SystemExit) as stop:
        command.main(["--from", str(hf), "--to", str(tmp_path / "m"), "--tp", "2", "--pp", "2"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit):
        command.main(["--from", str(tmp_path / "m"), "--to", str(tmp_path / "back")])
    assert_same_tensors(tmp_path / "back", weights)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["inspect", str(tmp_path / "m")])
    shown = capsys.readouterr().out
    for line in ("torch", "TP2 PP2", "1 (converted)", "float32", "mup width_scale         0.25"):
        assert line in shown
