"""Checkpoints go in and out in every layout that exists, with and without this package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from CrystalCoder import CrystalCoderConfig, CrystalCoderTokenizerFast
from support.elsewhere import run_remote
from support.reference_model import TINY, random_weights

CODE_FILES = {"configuration_crystalcoder.py", "modeling_crystalcoder.py", "tokenization_crystalcoder_fast.py"}


def buffers() -> dict[str, torch.Tensor]:
    """What published checkpoints carry beside the weights."""
    causal = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    each = {"bias": causal, "masked_bias": torch.tensor(-1e9)}
    return {f"transformer.h.{i}.attn.{name}": b.clone() for i in range(TINY.num_layers) for name, b in each.items()}


def write_checkpoint(
    folder: Path, config: CrystalCoderConfig, *, kind: str, shards: int, head: bool, extras: bool
) -> None:
    """A checkpoint directory written tensor by tensor, as other tools would write it."""
    tensors = random_weights(TINY, seed=1) | (buffers() if extras else {})
    if head:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    config.architectures = ["CrystalCoderLMHeadModel"]
    config.to_json_file(folder / "config.json")
    name, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    write = torch.save if kind == "bin" else save_file
    if shards == 1:
        write(tensors, folder / f"{name}.{suffix}")
        return
    # Cut without regard to layers: published shards cut through layers too.
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"{name}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {n: tensors[n] for n in names[shard::shards]}
        write(part, folder / file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": index}
    (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("head", "extras"), [(True, True), (False, False)])
def test_every_layout_loads(
    tmp_path: Path, own_model: Any, tokens: torch.Tensor, kind: str, shards: int, head: bool, extras: bool
) -> None:
    """`.bin` or safetensors, one file or several, with or without the head and the old buffers."""
    write_checkpoint(tmp_path, own_model.config, kind=kind, shards=shards, head=head, extras=extras)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model(tokens).logits, own_model(tokens).logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(tokens).last_hidden_state, own_model.transformer(tokens).last_hidden_state)


def test_a_missing_bias_is_told(tmp_path: Path, own_model: Any) -> None:
    """What is ignored are the old buffers `attn.bias`, not the bias of a linear inside the attention."""
    own_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.attn.c_attn.bias"]
    save_file(weights | {"transformer.h.1.attn.c_attn.other": torch.zeros(1)}, tmp_path / "model.safetensors")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"transformer.h.1.attn.c_attn.bias"}
    assert report["unexpected_keys"] == {"transformer.h.1.attn.c_attn.other"}


def test_saving_is_the_identity(tmp_path: Path, own_model: Any) -> None:
    """Every tensor bit for bit under its name; the tied head once; the muP constants and the code beside it."""
    own_model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), random_weights(TINY, seed=1)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
        "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
        "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
    }
    assert config["architectures"] == ["CrystalCoderLMHeadModel"]
    assert {key: config[key] for key in config if key.startswith("mup_")} == {
        "mup_width_scale": TINY.mup.width_scale,
        "mup_output_alpha": TINY.mup.output_alpha,
        "mup_embeddings_scale": TINY.mup.embeddings_scale,
        "mup_scale_qk_dot_by_d": True,
    }
    assert {path.name for path in tmp_path.glob("*.py")} == CODE_FILES - {"tokenization_crystalcoder_fast.py"}


def test_bf16_is_kept(tmp_path: Path, own_model: Any) -> None:
    own_model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model)
assert "transformers_modules" in type(tokenizer).__module__, type(tokenizer)
assert "CrystalCoder" not in sys.modules
messages = [{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "c"}]
ids = tokenizer.encode_chat(messages)
prompt = torch.tensor([ids]) % model.config.vocab_size
options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
std = [float(fresh.transformer.h[0].attn.c_proj.weight.std()), float(fresh.transformer.wte.weight.std())]
model.save_pretrained(again), tokenizer.save_pretrained(again)
logits, hidden = model(prompt).logits, decoder(prompt).last_hidden_state
torch.save({"ids": ids, "text": text, "logits": logits, "hidden": hidden, "std": std}, folder + "/result.pt")
"""


def test_a_saved_directory_runs_elsewhere(
    tmp_path: Path, own_model: Any, own_tokenizer: CrystalCoderTokenizerFast
) -> None:
    """In a process without this package: model and tokenizer from the directory alone, and saved from there again."""
    folder, again, cache = tmp_path / "model", tmp_path / "again", tmp_path / "cache"
    cache.mkdir()
    own_model.save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    run_remote(REMOTE, folder, again, cache=cache)
    result = torch.load(folder / "result.pt")
    messages = [{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "c"}]
    assert result["ids"] == own_tokenizer.encode_chat(messages)
    prompt = torch.tensor([result["ids"]]) % TINY.vocab_size
    assert torch.equal(result["logits"], own_model(prompt).logits)
    assert torch.equal(result["hidden"], own_model.transformer(prompt).last_hidden_state)
    text = own_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(result["text"], text)
    # transformers initialises remote code by other rules than its own models.
    assert result["std"] == pytest.approx([0.02 * (TINY.mup.width_scale / 8) ** 0.5, 0.02], rel=0.05)

    assert {path.name for path in again.iterdir()} >= CODE_FILES
    once_more = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(once_more(prompt).logits, own_model(prompt).logits)
    assert AutoTokenizer.from_pretrained(again).get_vocab() == own_tokenizer.get_vocab()


def test_our_code_beside_published_weights(tmp_path: Path, hf_tiny: Path, repo_root: Path) -> None:
    """The published layout (config, shards with buffers, tokenizer) with our three files dropped in."""
    folder, cache = tmp_path / "published", tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(hf_tiny, folder, copy_function=shutil.copyfile)
    os.chmod(folder, 0o755)
    for name in CODE_FILES:
        shutil.copyfile(repo_root / "Megatron-LM/CrystalCoder" / name, folder / name)
    run_remote(REMOTE, folder, tmp_path / "again", cache=cache)
    prompt = torch.tensor([torch.load(folder / "result.pt")["ids"]])
    model = AutoModelForCausalLM.from_pretrained(hf_tiny)
    assert torch.equal(torch.load(folder / "result.pt")["logits"], model(prompt).logits)
