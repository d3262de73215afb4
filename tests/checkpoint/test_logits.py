"""The check of logits: what it sees that comparing tensors through the table cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import weights as table
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.logits import _logits, compare_logits
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import ModelConfig
from support.checkpoints import distinct_weights, save_hf
from support.reference_model import TINY, reference_logits

ODD = replace(TINY, ffn_hidden_size=170, vocab_size=250)


@pytest.mark.parametrize("config", [TINY, replace(ODD, tie_word_embeddings=False)])
@pytest.mark.parametrize(
    ("format_", "layout"),
    [
        ("hf", {}),
        ("torch", {"tensor_parallel": 4, "pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("legacy", {"tensor_parallel": 2, "pipeline_parallel": 2, "stage_layers": (1, 3)}),
        ("torch_dist", {"tensor_parallel": 4}),
    ],
)
def test_every_format_computes_the_formulas(
    tmp_path: Path, config: ModelConfig, format_: Any, layout: dict[str, Any]
) -> None:
    """Against fp64 formulas; measured 1.4e-5."""
    weights = distinct_weights(config)
    convert(save_hf(tmp_path / "hf", weights, config), tmp_path / "out", format=format_, **layout)
    tokens_bs = torch.randint(0, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = reference_logits({name: x.double() for name, x in weights.items()}, config, tokens_bs)
    for path in ("hf", "out"):
        found = _logits(open_checkpoint(tmp_path / path), config, tokens_bs)
        assert (found - expected).abs().max() < 5e-5


def _linear_above_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = tuple(
        replace(row, hf=row.hf[::-1]) if row.kind == "gated" and row.shape == "f" else row for row in table.LAYER
    )
    monkeypatch.setattr(table, "LAYER", swapped)


def _qkv_not_regrouped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tuple(replace(row, kind="transpose") if row.kind == "qkv" else row for row in table.LAYER)
    monkeypatch.setattr(table, "LAYER", plain)


def _norms_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.hf[0].split(".")[-2]: row for row in table.LAYER if "ln_" in row.hf[0]}
    other = {"ln_1": rows["ln_2"], "ln_2": rows["ln_1"]}
    exchanged = []
    for row in table.LAYER:
        norm, kind = row.hf[0].split(".")[-2:]
        if norm in other:
            theirs = next(x for x in table.LAYER if x.hf[0].endswith(f"{other[norm].hf[0].split('.')[-2]}.{kind}"))
            row = replace(row, mcore=theirs.mcore, norm_fused=theirs.norm_fused)
        exchanged.append(row)
    monkeypatch.setattr(table, "LAYER", tuple(exchanged))


@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
@pytest.mark.parametrize("mistake", [_linear_above_gate, _qkv_not_regrouped, _norms_exchanged])
def test_a_mistake_in_the_table_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any, format_: Any
) -> None:
    """Made both ways, so that tensors compared through the table are equal."""
    hf = save_hf(tmp_path / "hf", distinct_weights())
    table.logical_shapes.cache_clear()
    mistake(monkeypatch)
    try:
        convert(hf, tmp_path / "unseen", format=format_, logits=False)
        with pytest.raises(InputError, match="computes other logits than its source"):
            convert(hf, tmp_path / "m", format=format_)
    finally:
        table.logical_shapes.cache_clear()
    assert not (tmp_path / "m").exists()


def test_a_cast_is_told_from_a_mistake(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    lines: list[str] = []
    convert(hf, tmp_path / "m", format="torch", dtype=torch.bfloat16, report=lines.append)
    assert any(line.startswith("logits on 2 prompts: max abs difference ") for line in lines)
    first, second = open_checkpoint(hf), open_checkpoint(tmp_path / "m")
    difference = compare_logits(first, second, TINY)
    assert 0 < difference.kl < 0.1
    assert difference.max_abs > 1e-3
