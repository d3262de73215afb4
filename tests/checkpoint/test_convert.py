"""Conversions there and back are the identity, in every format and between layouts.

A mistake made both ways (gate and linear bias exchanged, qkv not regrouped) passes a round trip; planted, it does. What
Megatron's tensors must be is held in test_weights.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.hf_writer import write_weights
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.model.initialization import InitSettings
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.reference_model import TINY, reference_logits

LAYOUTS = [("torch", 2, 4), ("torch", 1, 1), ("torch", 2, 2), ("torch_dist", 2, 2)]


@pytest.mark.parametrize(("format_", "tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_identity(tmp_path: Path, format_: str, tp: int, pp: int, tied: bool) -> None:
    config = replace(TINY, tie_word_embeddings=tied)
    weights = distinct_weights(config)
    hf = save_hf(tmp_path / "hf", weights, config, shards=1)
    convert(hf, tmp_path / "megatron", format=format_, tensor_parallel=tp, pipeline_parallel=pp)
    convert(tmp_path / "megatron", tmp_path / "back", format="hf")
    assert_same_tensors(tmp_path / "megatron", weights)
    assert_same_tensors(tmp_path / "back", weights)
    there, back = open_checkpoint(tmp_path / "megatron"), open_checkpoint(tmp_path / "back")
    assert there.config == back.config == config
    assert (there.tensor_parallel, there.pipeline_parallel) == (tp, pp)
    assert there.is_converted
    assert there.mup_recorded


@pytest.mark.parametrize(("format_", "tp", "pp"), LAYOUTS)
def test_the_reference_checkpoint_there_and_back(tmp_path: Path, shared: Path, format_: str, tp: int, pp: int) -> None:
    source = shared / "fixtures/hf_tiny"
    convert(source, tmp_path / "megatron", format=format_, tensor_parallel=tp, pipeline_parallel=pp)
    convert(tmp_path / "megatron", tmp_path / "back", format="hf")
    assert_same_tensors(tmp_path / "back", open_checkpoint(source).weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "back/config.json").read_text())
    assert before.items() <= after.items()


def test_between_megatron_layouts_and_formats(tmp_path: Path) -> None:
    """TP2/PP4 -> torch_dist -> TP4/PP1 -> TP1/PP2; every step holds the same logical tensors."""
    weights = distinct_weights()
    source = save_hf(tmp_path / "hf", weights)
    steps = [("torch", 2, 4), ("torch_dist", None, None), ("torch", 4, 1), ("torch", 1, 2)]
    for number, (format_, tp, pp) in enumerate(steps):
        target = tmp_path / str(number)
        convert(source, target, format=format_, tensor_parallel=tp, pipeline_parallel=pp)
        assert_same_tensors(target, weights)
        source = target
    files = {str(path.relative_to(tmp_path / "0")) for path in (tmp_path / "0").rglob("*.pt")}
    assert files == {f"iter_0000001/mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt" for t in range(2) for p in range(4)}
    assert (tmp_path / "2/iter_0000001/mp_rank_03/model_optim_rng.pt").is_file()
    assert (tmp_path / "0/latest_checkpointed_iteration.txt").read_text() == "1"


def test_rank_files_are_ordinary_torch_files(tmp_path: Path) -> None:
    """They are filled in place after torch.save; plain torch.load must not notice."""
    source = open_checkpoint(save_hf(tmp_path / "hf", distinct_weights()))
    convert(source.path, tmp_path / "out", format="torch", tensor_parallel=2)
    content = torch.load(tmp_path / "out/iter_0000001/mp_rank_01/model_optim_rng.pt", weights_only=False)
    assert content["checkpoint_version"] == 3.0
    args = content["args"]
    assert (args.use_mup, args.mup_width_scale, args.mup_output_alpha) == (True, 0.25, 2.22)
    assert (args.mup_embeddings_scale, args.mup_scale_qk_dot_by_d) == (14.6, True)
    assert (args.rotary_interleaved, args.norm_epsilon, args.rotary_percent) == (True, 1e-5, 0.25)
    assert args.num_query_groups == TINY.num_attention_heads
    weight = content["model"]["decoder.layers.3.mlp.linear_fc2.weight"]
    assert torch.equal(weight, source.weights.read("transformer.h.3.mlp.c_proj.weight").T[:, 86:])


def test_sharded_safetensors_with_index_are_what_the_library_reads(tmp_path: Path) -> None:
    weights = distinct_weights()
    source = open_checkpoint(save_hf(tmp_path / "hf", weights)).weights
    out = tmp_path / "out"
    out.mkdir()
    write_weights(out, source, max_shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file: load_file(out / file) for file in set(index["weight_map"].values())}
    assert len(files) > 3
    for name, tensor in weights.items():
        assert torch.equal(files[index["weight_map"][name]][name], tensor)
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in weights.values())
    (out / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    assert_same_tensors(out, weights)


def test_transformers_loads_the_export_with_the_reference_logits(tmp_path: Path) -> None:
    """Through all layers of the kit: HF -> TP2/PP2 -> HF -> transformers, against fp64 formulas; measured 1.2e-6."""
    from transformers import AutoModelForCausalLM

    import CrystalCoder  # noqa: F401 - registers the Auto classes

    weights = distinct_weights()
    convert(save_hf(tmp_path / "hf", weights), tmp_path / "m", format="torch", tensor_parallel=2, pipeline_parallel=2)
    convert(tmp_path / "m", tmp_path / "back", format="hf")
    tokens_bs = torch.randint(0, TINY.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        logits = model(tokens_bs).logits
    assert model.dtype == torch.float32
    expected = reference_logits({name: x.double() for name, x in weights.items()}, TINY, tokens_bs)
    assert (logits - expected).abs().max() < 1e-4
    assert (tmp_path / "back/modeling_crystalcoder.py").is_file()


def test_dtype_is_kept_or_cast(tmp_path: Path) -> None:
    half = {name: x.bfloat16() for name, x in distinct_weights().items()}
    half["transformer.ln_f.weight"] = half["transformer.ln_f.weight"].float()  # dtypes may be mixed
    hf = save_hf(tmp_path / "hf", half)
    for format_ in ("torch", "torch_dist"):
        convert(hf, tmp_path / format_, format=format_, tensor_parallel=2)
        assert_same_tensors(tmp_path / format_, half)
    assert open_checkpoint(tmp_path / "torch").args.bf16
    convert(tmp_path / "torch", tmp_path / "wide", format="hf", dtype=torch.float32)
    assert_same_tensors(tmp_path / "wide", {name: x.float() for name, x in half.items()})
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"


def test_legacy_checkpoint_to_all_formats(tmp_path: Path, shared: Path) -> None:
    legacy, hf = shared / "fixtures/megatron_legacy_tiny_tp2_pp2", shared / "fixtures/hf_tiny"
    expected = {name: x.half() for name, x in _tensors(hf).items()}
    for format_ in ("hf", "torch", "torch_dist"):
        convert(legacy, tmp_path / format_, format=format_, hf_config=hf)
        assert_same_tensors(tmp_path / format_, expected)
        assert open_checkpoint(tmp_path / format_).config == open_checkpoint(hf).config
    assert (tmp_path / "hf/tokenizer.json").is_file()


def test_config_json_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    convert(hf, tmp_path / "m", format="torch")
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "mup_width_scale": 0.5}))
    with pytest.raises(InputError, match=r"says mup_width_scale 0\.5, but .* has 0\.25"):
        convert(tmp_path / "m", tmp_path / "out", format="hf", hf_config=other)
    (other / "config.json").write_text(json.dumps({**values, "resid_pdrop": 0.25, "n_positions": 4096}))
    convert(tmp_path / "m", tmp_path / "out", format="hf", hf_config=other)
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.25


def test_random_weights_convert_like_any_others(tmp_path: Path) -> None:
    source = RandomWeights(TINY, InitSettings.for_hf(TINY), seed=3)
    (tmp_path / "hf").mkdir()
    write_weights(tmp_path / "hf", source)
    (tmp_path / "hf/config.json").write_bytes(
        (save_hf(tmp_path / "x", distinct_weights()) / "config.json").read_bytes()
    )
    convert(tmp_path / "hf", tmp_path / "m", format="torch", tensor_parallel=2, pipeline_parallel=2)
    assert_same_tensors(tmp_path / "m", source)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    weights = open_checkpoint(path).weights
    return {name: weights.read(name) for name in weights.names()}
