"""From chat data to an exported model by the commands alone: prepare, run (an adapter too), export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import Turn, encode_prompt
from finetune.templates import CHATML, template_beside
from megatron.crystalcoder.checkpoint.adapter import read_adapter
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from support.checkpoints import distinct_weights, save_hf
from support.dying_rank import write_dying_rank
from support.reference_model import TINY
from support.training_runs import column
from tools.chat import system_beside
from tools.cli import main

CONFIG = replace(TINY, vocab_size=1024)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as status:
        main([str(argument) for argument in arguments])
    return int(status.value.code or 0)


def prepare(folder: Path, hf: Path, data: Path, *more: object) -> None:
    pairs = [{"prompt": f"Add {i} and {i + 1}", "completion": f"The sum is {2 * i + 1}."} for i in range(40)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    options = ("--max-seq-length", 64, "--packing", "best-fit", "--valid", 0.2, "--system", "", *more)
    assert run("finetune", "prepare", folder / "pairs.json", "--out", data, "--tokenizer", hf, *options) == 0


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_whole_way(tmp_path: Path, tokenizer_file: Path, capfd: pytest.CaptureFixture[str], tp: int) -> None:
    """The exported weights are base + alpha / r * B A of the best checkpoint; tokenizer and template come along."""
    weights = distinct_weights(CONFIG)
    hf = save_hf(tmp_path / "hf", weights, CONFIG)
    shutil.copyfile(tokenizer_file, hf / "tokenizer.json")
    data, save, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    prepare(tmp_path, hf, data, "--template", "chatml")
    how = ("--iters", 2, "--global-batch-size", 2, "--tp", tp, "--eval-interval", 1, "--lora-rank", 2)
    assert run("finetune", "run", data, "--load", hf, "--save", save, *how, "--lora-alpha", 8) == 0
    assert "corrupted" not in capfd.readouterr().err  # megatron-core's word for a folder that holds the adapter already
    assert run("finetune", "export", save, "--to", out, "--best") == 0
    assert "its adapter merged" in capfd.readouterr().out

    adapter = read_adapter(out / "adapter", CONFIG)
    assert adapter.settings.scale == 4.0
    exported = open_checkpoint(out).weights
    for name, weight in weights.items():
        expected = weight
        if name.removesuffix(".weight") in adapter.matrices:
            a, b = adapter.matrices[name.removesuffix(".weight")]
            expected = weight + 4.0 * (b @ a).t()
        torch.testing.assert_close(exported.read(name), expected, atol=1e-6, rtol=0, msg=name)
    assert (out / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    assert template_beside(out) == CHATML
    assert system_beside(out) == ""
    from transformers import AutoTokenizer

    asked = [{"role": "user", "content": "Add 1 and 2"}]
    ids = AutoTokenizer.from_pretrained(out).apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ids == encode_prompt([Turn("user", "Add 1 and 2")], load_tokenizer(out), CHATML)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [load_tokenizer(out).controls[token] for token in ("</s>", "<|im_end|>", "<|im_start|>")]

    # What a refused call was given is not what the run began with.
    prepare(tmp_path, hf, tmp_path / "other")
    assert run("finetune", "run", tmp_path / "other", "--load", hf, "--save", save, *how, "--lora-alpha", 8) == 2
    assert "other data" in capfd.readouterr().err
    assert run("finetune", "export", save, "--to", tmp_path / "again") == 0
    for name in ("tokenizer.json", "chat_format.yaml", "chat_template.jinja", "system_prompt.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()

    assert run("finetune", "export", save, "--to", out) == 2
    assert "exists already" in capfd.readouterr().err
    assert run("finetune", "run", tmp_path, "--load", hf, "--save", save) == 2
    assert "holds no prepare.json" in capfd.readouterr().err
    assert run("finetune", "run", data, "--load", tmp_path / "no", "--save", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
    assert run("finetune", "export", save, "--to", tmp_path / "third", "--tokenizer", tmp_path / "no") == 2
    assert f"{tmp_path / 'no'}: is no tokenizer" in capfd.readouterr().err
    assert not (tmp_path / "third").exists()
    words = tmp_path / "words.json"
    words.write_text(tokenizer_file.read_text() + "\n")
    assert run("finetune", "export", save, "--to", tmp_path / "third", "--tokenizer", words) == 0
    assert (tmp_path / "third/tokenizer.json").read_bytes() == words.read_bytes()


@pytest.mark.slow
def test_a_rank_that_dies_is_replaced(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed as step 4 begins, with checkpoints at every second: the run ends with the losses of an undisturbed one."""
    hf = save_hf(tmp_path / "hf", distinct_weights(CONFIG), CONFIG)
    shutil.copyfile(tokenizer_file, hf / "tokenizer.json")
    data = tmp_path / "data"
    prepare(tmp_path, hf, data)
    how = ("--load", hf, "--iters", 5, "--global-batch-size", 2, "--tp", 2, "--save-interval", 2)
    assert run("finetune", "run", data, "--save", tmp_path / "whole", *how) == 0
    dying = write_dying_rank(tmp_path / "dying", rank=1, step=4)
    monkeypatch.setenv("PYTHONPATH", str(dying))
    assert run("finetune", "run", data, "--save", tmp_path / "again", *how) == 0
    assert (dying / "died").exists()
    assert "rank 1 ended with signal 9: going on from the last checkpoint (restart 1 of 3)" in capfd.readouterr().err
    np.testing.assert_array_equal(column(tmp_path / "again", "lm_loss"), column(tmp_path / "whole", "lm_loss"))
