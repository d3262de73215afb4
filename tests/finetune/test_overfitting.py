"""A small model learns its examples by heart, and says them after export: prepare, run, export, transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel
from support.training_runs import column
from tools.cli import main

Pair = dict[str, str]


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as status:
        main([str(argument) for argument in arguments])
    assert not status.value.code


def save_new_model(folder: Path, tokenizer: Path, config: CrystalCoderConfig) -> int:
    """A model with random weights, the tokenizer beside it; how many parameters it has."""
    torch.manual_seed(0)
    model = CrystalCoderLMHeadModel(config)
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return sum(parameter.numel() for parameter in model.parameters())


def learn_by_heart(folder: Path, pairs: list[Pair], rows: int, iters: int, lr: float, batch: int) -> None:
    """Tune folder/hf on the pairs by the commands, and export it to folder/chat. rows: tokens in each."""
    (folder / "pairs.json").write_text(json.dumps(pairs))
    packed = ("--max-seq-length", rows, "--packing", "best-fit", "--system", "")
    command(
        "finetune", "prepare", folder / "pairs.json", "--out", folder / "data", "--tokenizer", folder / "hf", *packed
    )
    how = ("--iters", iters, "--lr", lr, "--global-batch-size", batch, "--micro-batch-size", batch)
    where = ("--load", folder / "hf", "--save", folder / "run", "--lr-warmup-fraction", 0.1)
    command("finetune", "run", folder / "data", *where, *how)
    command("finetune", "export", folder / "run", "--to", folder / "chat")


def check_answers(folder: Path, pairs: list[Pair]) -> None:
    """Asked in the template that the export carries, the model gives each answer, and ends it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    model = AutoModelForCausalLM.from_pretrained(folder / "chat").eval()
    for pair in pairs:
        question = pair["instruction"] + ("\n" + pair["input"] if pair.get("input") else "")
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        written = model.generate(**asked, max_new_tokens=400, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written, skip_special_tokens=True) == pair["output"]


def test_made_pairs(tmp_path: Path, tokenizer_file: Path) -> None:
    pairs = [{"instruction": f"What follows {i}?", "output": f"After {i} comes {i + 1}."} for i in range(10, 15)]
    config = CrystalCoderConfig(
        vocab_size=1024, n_positions=128, n_embd=64, n_layer=2, n_head=2, n_inner=128, rotary_dim=8,
        mup_width_scale=1.0, initializer_range=0.2,
    )  # fmt: skip
    save_new_model(tmp_path / "hf", tokenizer_file, config)
    learn_by_heart(tmp_path, pairs, rows=128, iters=50, lr=1e-2, batch=1)
    assert column(tmp_path / "run", "lm_loss")[-1] < 0.05
    check_answers(tmp_path, pairs)


@pytest.mark.slow
def test_fifty_code_alpaca_pairs(shared: Path, tmp_path: Path) -> None:
    """Real examples, the published tokenizer, a model of 6 million parameters."""
    pairs = json.loads((shared / "data/code_alpaca_2k.json").read_text())[:50]
    config = CrystalCoderConfig(
        vocab_size=32032, n_positions=384, n_embd=128, n_layer=8, n_head=4, n_inner=344, rotary_dim=8,
        mup_width_scale=0.5, initializer_range=0.2,
    )  # fmt: skip
    size = save_new_model(tmp_path / "hf", shared / "data/crystalcoder_tokenizer.json", config)
    assert 5.5e6 < size < 6.5e6
    learn_by_heart(tmp_path, pairs, rows=384, iters=160, lr=1e-2, batch=3)
    assert column(tmp_path / "run", "lm_loss")[-1] < 0.05
    check_answers(tmp_path, pairs)
