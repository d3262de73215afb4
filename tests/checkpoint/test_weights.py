"""The table against the mapping written out as loops, and against what the reference's own converter wrote."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import safe_load
from megatron.crystalcoder.checkpoint.directory import rank_file
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.checkpoint.weights import megatron_shape, rank_state_dict, rank_tensors, stage_rows
from megatron.crystalcoder.model.config import ModelConfig
from support.checkpoints import distinct_weights, save_hf
from support.reference_model import TINY


def mapping_as_loops(
    weights: dict[str, Tensor], config: ModelConfig, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int
) -> dict[str, Tensor]:
    """One rank's megatron-core tensors, element by element as the mapping is defined; shares nothing with the table."""
    h, f, n, d = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads, config.head_dim
    heads = range(tp_rank * n // tp_size, (tp_rank + 1) * n // tp_size)
    rows_v = slice(tp_rank * config.vocab_size // tp_size, (tp_rank + 1) * config.vocab_size // tp_size)
    columns_h = [head * d + j for head in heads for j in range(d)]
    columns_f = list(range(tp_rank * f // tp_size, (tp_rank + 1) * f // tp_size))
    out: dict[str, Tensor] = {}
    if pp_rank == 0:
        out["embedding.word_embeddings.weight"] = weights["transformer.wte.weight"][rows_v]
    per_stage = config.num_layers // pp_size
    for local in range(per_stage):
        hf, core = f"transformer.h.{pp_rank * per_stage + local}.", f"decoder.layers.{local}."
        for kind in ("weight", "bias"):
            out[f"{core}input_layernorm.{kind}"] = weights[f"{hf}ln_1.{kind}"]
            out[f"{core}pre_mlp_layernorm.{kind}"] = weights[f"{hf}ln_2.{kind}"]
            # q, k, v of one head, then of the next; in Hugging Face all q, then all k, then all v.
            columns = [part * h + head * d + j for head in heads for part in range(3) for j in range(d)]
            qkv = weights[f"{hf}attn.c_attn.{kind}"]
            out[f"{core}self_attention.linear_qkv.{kind}"] = torch.stack([qkv[..., c] for c in columns])
            gate, linear = weights[f"{hf}mlp.c_fc2.{kind}"], weights[f"{hf}mlp.c_fc.{kind}"]
            out[f"{core}mlp.linear_fc1.{kind}"] = torch.stack(
                [gate[..., c] for c in columns_f] + [linear[..., c] for c in columns_f]
            )
        proj, fc2 = weights[f"{hf}attn.c_proj.weight"], weights[f"{hf}mlp.c_proj.weight"]
        out[f"{core}self_attention.linear_proj.weight"] = torch.stack([proj[row] for row in columns_h], dim=1)
        out[f"{core}mlp.linear_fc2.weight"] = torch.stack([fc2[row] for row in columns_f], dim=1)
        out[f"{core}self_attention.linear_proj.bias"] = weights[f"{hf}attn.c_proj.bias"]
        out[f"{core}mlp.linear_fc2.bias"] = weights[f"{hf}mlp.c_proj.bias"]
    if pp_rank == pp_size - 1:
        for kind in ("weight", "bias"):
            out[f"decoder.final_layernorm.{kind}"] = weights[f"transformer.ln_f.{kind}"]
        if not config.tie_word_embeddings:
            out["output_layer.weight"] = weights["lm_head.weight"][rows_v]
        elif pp_size > 1:
            out["output_layer.weight"] = weights["transformer.wte.weight"][rows_v]
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_every_rank_equals_the_loops(tmp_path: Path, tied: bool) -> None:
    """Planted: [linear; gate] in mlp.linear_fc1.bias alone; qkv transposed but not regrouped; a gated tensor cut as a
    whole instead of in halves; layers of the second stage numbered from 0 in Hugging Face: each fails here."""
    config = replace(TINY, tie_word_embeddings=tied)
    weights = distinct_weights(config)
    source = open_checkpoint(save_hf(tmp_path / "hf", weights, config)).weights
    for tp_size, pp_size in ((1, 1), (2, 2), (4, 1), (1, 4), (2, 4)):
        for tp_rank in range(tp_size):
            for pp_rank in range(pp_size):
                layout = {"tp_rank": tp_rank, "tp_size": tp_size, "pp_rank": pp_rank, "pp_size": pp_size}
                expected = mapping_as_loops(weights, config, **layout)
                found = rank_state_dict(source, config, **layout)
                assert found.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert torch.equal(found[name], tensor), (name, layout)
                    assert found[name].is_contiguous(), name


def test_shards_do_not_share_memory(tmp_path: Path) -> None:
    """A view would make torch.save write the whole tensor into every rank's file."""
    source = open_checkpoint(save_hf(tmp_path / "hf", distinct_weights())).weights
    for row, tensor in rank_tensors(source, TINY, tp_rank=1, tp_size=2, pp_rank=0, pp_size=1):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), row.mcore


def test_shapes_without_data_are_those_with(tmp_path: Path) -> None:
    source = open_checkpoint(save_hf(tmp_path / "hf", distinct_weights())).weights
    real = rank_state_dict(source, TINY, tp_rank=1, tp_size=2, pp_rank=1, pp_size=2)
    foretold = {row.mcore: megatron_shape(row, TINY, 2) for row in stage_rows(TINY, 1, 2)}
    assert foretold == {name: tuple(tensor.shape) for name, tensor in real.items()}


def test_tensor_parallel_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(save_hf(tmp_path / "hf", distinct_weights())).weights
    with pytest.raises(InputError, match="tensor parallel size 3 does not divide the attention heads"):
        rank_state_dict(source, TINY, tp_rank=0, tp_size=3, pp_rank=0, pp_size=1)


def test_hugging_face_tensors_have_the_recorded_hashes(shared: Path) -> None:
    """The real layout: four .bin shards, layers that straddle them, buffers and a stored head."""
    recorded = json.loads((shared / "fixtures/reference/tiny.weights.json").read_text())
    weights = open_checkpoint(shared / "fixtures/hf_tiny").weights
    assert set(weights.names()) == recorded.keys()
    for name, facts in recorded.items():
        tensor = weights.read(name)
        assert list(tensor.shape) == facts["shape"]
        assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] == facts["sha256_16"], name


def test_rank_tensors_equal_those_the_reference_converter_wrote(shared: Path) -> None:
    """hf_tiny in fp16, tensor by tensor of every rank's file, read without the table: its forward direction.

    Planted: q, k, v regrouped as [3, heads, d]: 16 tensors differ; bias halves of dense_h_to_4h swapped: 8 differ.
    """
    fixtures = shared / "fixtures"
    source = open_checkpoint(fixtures / "hf_tiny").weights
    for tp_rank in range(2):
        for pp_rank in range(2):
            path = rank_file(fixtures / "megatron_legacy_tiny_tp2_pp2/iter_0000001", tp_rank, pp_rank, 2)
            model = safe_load.load(path)["model"]
            language = model["language_model"]
            stored = {f"language_model.encoder.{name}": x for name, x in language["encoder"].items()}
            if pp_rank == 0:
                embedding = language["embedding"]["word_embeddings"]["weight"]
                stored["language_model.embedding.word_embeddings.weight"] = embedding
            else:
                stored["word_embeddings_for_head.weight"] = model["word_embeddings_for_head"]["weight"]
            layout = {"tp_rank": tp_rank, "tp_size": 2, "pp_rank": pp_rank, "pp_size": 2}
            found = {row.legacy: tensor for row, tensor in rank_tensors(source, source.config, **layout)}
            assert found.keys() == stored.keys()
            for name, tensor in stored.items():
                assert torch.equal(found[name].half(), tensor), (name, layout)


def test_legacy_checkpoint_reads_as_the_hugging_face_one(shared: Path) -> None:
    """The backward direction, through open_checkpoint: equal after fp16 rounding, bit for bit."""
    legacy = open_checkpoint(shared / "fixtures/megatron_legacy_tiny_tp2_pp2")
    hf = open_checkpoint(shared / "fixtures/hf_tiny")
    assert (legacy.format, legacy.mup_recorded, legacy.is_converted) == ("legacy", False, True)
    assert replace(legacy.config, mup=hf.config.mup) == hf.config
    for name in hf.weights.names():
        assert torch.equal(legacy.weights.read(name), hf.weights.read(name).half()), name
