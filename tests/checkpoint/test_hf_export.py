"""What stands in a Hugging Face export beside the weights, and that other programs take it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from CrystalCoder.build_tokenizer import build_tokenizer
from CrystalCoder.tokenization_crystalcoder_fast import CHAT_TEMPLATE
from megatron.crystalcoder.checkpoint import hf_writer
from megatron.crystalcoder.checkpoint.convert import convert
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.elsewhere import run_remote
from support.reference_model import TINY, reference_logits
from support.sentencepiece_model import train_sentencepiece

# Vocabulary of the little tokenizer below, with room.
CONFIG = replace(TINY, vocab_size=1024)
CODE = ["configuration_crystalcoder.py", "modeling_crystalcoder.py", "tokenization_crystalcoder_fast.py"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CrystalCoder tokenizer as published ones are: without a chat template of its own."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(train_sentencepiece(folder / "tokenizer.model"), folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def export(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF -> Megatron -> HF in several shards."""
    hf = save_hf(tmp_path / "hf", distinct_weights(CONFIG), CONFIG, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).write_bytes((tokenizer / name).read_bytes())
    convert(hf, tmp_path / "m", format="torch_dist", tensor_parallel=2)
    monkeypatch.setattr(hf_writer.lay_out_hf, "__defaults__", (200_000,))
    convert(tmp_path / "m", tmp_path / "My model", format="hf")
    return tmp_path / "My model"


def test_everything_is_there(export: Path, tokenizer: Path) -> None:
    names = {path.name for path in export.iterdir()}
    shards = {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(shards) > 2
    assert names - shards == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *CODE,
    }
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    config = json.loads((export / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    generation = json.loads((export / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (export / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    weights = distinct_weights(CONFIG)
    for shard in shards:
        with safe_open(export / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                assert torch.equal(file.get_tensor(name), weights.pop(name))
    assert not weights


def test_model_card(export: Path, tmp_path: Path) -> None:
    """What it says is this model's; its metadata is YAML; a Hugging Face source's own card is kept."""
    import yaml

    card = (export / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["crystalcoder", "code", "mup"],
    }
    assert body.startswith("\n# My model\n")
    for fact in (f"{CONFIG.num_parameters:,}", "float32 safetensors", "| layers | 4 |", "embeddings × 14.6"):
        assert fact in body
    assert "apply_chat_template" in body
    (export / "README.md").write_text("# mine\n")
    convert(export, tmp_path / "half", format="hf", dtype=torch.bfloat16)
    assert (tmp_path / "half/README.md").read_text() == "# mine\n"
    (export / "tokenizer.json").unlink()
    (export / "README.md").unlink()
    convert(export, tmp_path / "no_tokenizer", format="hf")
    assert "AutoTokenizer" not in (tmp_path / "no_tokenizer/README.md").read_text()


def test_a_template_of_the_tokenizer_is_kept(export: Path, tmp_path: Path) -> None:
    assert (export / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    (export / "chat_template.jinja").write_text("{{ messages }}")
    convert(export, tmp_path / "own", format="hf", verify=False)
    assert (tmp_path / "own/chat_template.jinja").read_text() == "{{ messages }}"
    (export / "chat_template.jinja").unlink()
    settings = json.loads((export / "tokenizer_config.json").read_text())
    (export / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 1 }}"}))
    convert(export, tmp_path / "inside", format="hf", verify=False)
    assert not (tmp_path / "inside/chat_template.jinja").exists()


# The model card's own example, as a user runs it in the directory.
_CARD = r"""
import os, re, sys, torch
folder, result = sys.argv[1:]
os.chdir(folder)
code = re.search(r"```python\n(.*?)```", open("README.md").read(), re.DOTALL)[1]
exec(code.replace("max_new_tokens=64", "max_new_tokens=3"))
assert "transformers_modules" in type(model).__module__
assert "CrystalCoder" not in sys.modules
tokens = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    torch.save({"logits": model(tokens).logits, "chat": inputs["input_ids"]}, result)
"""


@pytest.mark.slow
def test_the_card_example_runs_in_stock_transformers(export: Path, tmp_path: Path) -> None:
    """In a process that does not have this project, with the reference's logits; measured 1.2e-6."""
    (tmp_path / "cache").mkdir()
    run_remote(_CARD, export, tmp_path / "result.pt", cache=tmp_path / "cache")
    result = torch.load(tmp_path / "result.pt")
    weights = {name: x.double() for name, x in distinct_weights(CONFIG).items()}
    expected = reference_logits(weights, CONFIG, torch.arange(24).reshape(2, 12))
    assert (result["logits"] - expected).abs().max() < 1e-4
    control = json.loads((export / "tokenizer.json").read_text())["added_tokens"]
    starts = {token["content"]: token["id"] for token in control}
    assert result["chat"][0, :2].tolist() == [starts["<s>"], starts["<|im_start|>"]]


_LM_EVAL = """
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
import torch
folder, result = sys.argv[1:]
model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
requests = [Instance("loglikelihood", {}, ("def add(a, b):", text), 0) for text in (" return", " pass")]
torch.save([float(x) for x, _ in model.loglikelihood(requests)], result)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval")
def test_lm_eval_takes_it(export: Path, tmp_path: Path) -> None:
    """lm-eval's log-likelihood of a continuation is the sum of the model's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import CrystalCoder  # noqa: F401 - registers the Auto classes

    (tmp_path / "cache").mkdir()
    run_remote(_LM_EVAL, export, tmp_path / "result.pt", cache=tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    for text, found in zip((" return", " pass"), torch.load(tmp_path / "result.pt"), strict=True):
        whole = tokenizer("def add(a, b):" + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = len(tokenizer("def add(a, b):", add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores = model(whole).logits.log_softmax(-1)[0, start - 1 : -1]
        assert float(scores.gather(1, whole[0, start:, None]).sum()) == pytest.approx(found, abs=1e-3)
    assert_same_tensors(export, distinct_weights(CONFIG))
