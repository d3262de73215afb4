"""The two command lines: Megatron's flags, and `crystalcoder convert`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.checkpoint.transfer import Transfer
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


def test_a_legacy_checkpoint_changes_its_layout(tmp_path: Path, util: ModuleType, shared: Path) -> None:
    """It records no muP constants. Planted: --hf-config-path refused with --saver megatron, so none could be given."""
    legacy = shared / "fixtures/megatron_legacy_tiny_tp2_pp2"
    util.main(
        f"--model-type GPT --loader megatron --saver megatron --load-dir {legacy} "
        f"--save-dir {tmp_path}/m --target-tensor-parallel-size 1 --target-pipeline-parallel-size 4 "
        f"--hf-config-path {shared}/fixtures/hf_tiny".split()
    )
    written = open_checkpoint(tmp_path / "m")
    assert str(written.layout) == "TP1 PP4"
    assert written.config == open_checkpoint(shared / "fixtures/hf_tiny").config


@pytest.fixture
def util(repo_root: Path) -> ModuleType:
    """The script as a module."""
    spec = spec_from_file_location("util", repo_root / "Megatron-LM/tools/checkpoint/util.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrong_flags_are_refused(tmp_path: Path, util: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    (tmp_path / "text.json").write_text("no")
    base = f"--model-type GPT --loader crystalcoder_hf --saver megatron --load-dir {hf} --save-dir {tmp_path}/out"
    for wrong, message in (
        ("--use-magic", "unrecognized arguments: --use-magic"),
        ("--model-type BERT", "invalid choice: 'BERT'"),
        ("--saver mcore", "invalid choice: 'mcore'"),
        ("--hf-config-path CrystalCoder", "--hf-config-path belongs to --saver crystalcoder_hf"),
        ("--vocab-file vocab.json", "--vocab-file belongs to --loader megatron"),
        ("--true-vocab-size 32000", "has 256 rows, not the 32000"),
        ("--true-vocab-size 0", "--true-vocab-size must be at least 1"),
        ("--max-queue-size 0", "--max-queue-size must be at least 1"),
        ("--loader megatron", "use --loader crystalcoder_hf"),
        (f"--loader megatron --vocab-file {tmp_path}/no.json", "no.json: cannot be read"),
        (f"--loader megatron --vocab-file {tmp_path}/text.json", "text.json: is no JSON object of tokens and ids"),
        ("--save-format legacy --saver-transformer-impl transformer_engine", "legacy names the norms in one way only"),
        ("--target-tensor-parallel-size 3", "does not divide the attention heads"),
        (f"--tokenizer-model {tmp_path}/tokenizer.model", "tokenizer.model: is no tokenizer"),
        (f"--megatron-path {tmp_path}", "holds no `megatron` directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            util.main(f"{base} {wrong}".split())
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_every_flag_has_its_effect(
    tmp_path: Path, util: ModuleType, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways with all flags of the reference, and with the plug-ins named by their modules."""
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"some": "tokenizer"}')
    queue_sizes: list[int] = []
    real = Transfer.run

    def run(self: Transfer, *, workers: int, max_queue_size: int, progress: Any) -> None:
        assert workers == 2
        queue_sizes.append(max_queue_size)
        real(self, workers=workers, max_queue_size=max_queue_size, progress=progress)

    monkeypatch.setattr(Transfer, "run", run)
    util.main(
        f"--model-type GPT --loader loader_crystalcoder_hf --saver saver_megatron --load-dir {hf} "
        f"--save-dir {tmp_path}/m --megatron-path {repo_root}/Megatron-LM --true-vocab-size 256 "
        f"--tokenizer-model {tmp_path}/tokenizer --max-queue-size 5 --workers 2 --target-tensor-parallel-size 2 "
        "--target-pipeline-parallel-size 2 --target-virtual-pipeline-parallel-size 2 --make-vocab-size-divisible-by 96 "
        "--dtype bfloat16 --release --save-format torch --saver-transformer-impl transformer_engine".split()
    )
    assert queue_sizes == [5]
    written = open_checkpoint(tmp_path / "m")
    assert str(written.layout) == "TP2 PP2 VPP2"
    assert (written.config.vocab_size, written.folder.name) == (384, "release")
    content = torch.load(tmp_path / "m/release/mp_rank_01_000/model_optim_rng.pt", weights_only=False)
    assert content["args"].transformer_impl == "transformer_engine"
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in content["model0"]
    assert_same_tensors(tmp_path / "m", {name: x.bfloat16() for name, x in weights.items()})

    (tmp_path / "vocab.json").write_text(json.dumps({str(token): token for token in range(200)}))
    util.main(
        f"--model-type GPT --loader megatron --saver crystalcoder_hf --load-dir {tmp_path}/m "
        f"--save-dir {tmp_path}/back --vocab-file {tmp_path}/vocab.json --hf-config-path CrystalCoder "
        "--no-checking --workers 2 --max-queue-size=7".split()
    )
    assert queue_sizes == [5, 7]
    back = open_checkpoint(tmp_path / "back")
    assert back.config.vocab_size == 200
    embedding = weights["transformer.wte.weight"][:200].bfloat16()
    assert torch.equal(back.weights.read("transformer.wte.weight"), embedding)
    assert (tmp_path / "back/tokenizer.json").read_text() == '{"some": "tokenizer"}'
    with pytest.raises(SystemExit):
        util.main(
            f"--model-type GPT --loader megatron --saver crystalcoder_hf --load-dir {tmp_path}/m "
            f"--save-dir {tmp_path}/no --vocab-file {tmp_path}/vocab.json --true-vocab-size 256".split()
        )


def test_no_checking_checks_nothing(tmp_path: Path, util: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tensors are read back nor logits computed: both would fail here."""
    hf = save_hf(tmp_path / "hf", distinct_weights())

    def fail(*arguments: Any, **more: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("megatron.crystalcoder.checkpoint.convert.compare_logits", fail)
    monkeypatch.setattr(Transfer, "_same", fail)
    base = f"--model-type GPT --loader crystalcoder_hf --saver megatron --load-dir {hf} --save-dir {tmp_path}/m"
    with pytest.raises(AssertionError):
        util.main(base.split())
    util.main([*base.split(), "--no-checking"])
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").is_file()


def test_crystalcoder_convert(tmp_path: Path) -> None:
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    with pytest.raises(SystemExit) as stop:
        command.main(["--from", str(hf), "--to", str(tmp_path / "m"), "--tp", "2", "--pp", "2"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit):
        command.main(["--from", str(tmp_path / "m"), "--to", str(tmp_path / "back")])
    assert_same_tensors(tmp_path / "back", weights)
