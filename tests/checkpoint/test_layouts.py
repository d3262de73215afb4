"""Layouts beyond the even: padded for tensor parallelism, virtual pipelines, stages of different lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.layout import Layout, layout_args, layout_of, make_layout
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import ModelConfig
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.reference_model import TINY

# As in the 7B model, neither the FFN (2 x 5 x 17) nor here the vocabulary (2 x 125) splits over 4 or 8 ranks.
ODD = replace(TINY, num_attention_heads=8, ffn_hidden_size=170, vocab_size=250, num_layers=6)


@pytest.mark.parametrize("format_", ["torch", "torch_dist", "legacy"])
@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (8, 2)])
def test_padded_there_and_back(tmp_path: Path, format_: str, tp: int, pp: int) -> None:
    weights = distinct_weights(ODD)
    hf = save_hf(tmp_path / "hf", weights, ODD)
    convert(hf, tmp_path / "m", format=format_, tensor_parallel=tp, pipeline_parallel=pp)
    padded = open_checkpoint(tmp_path / "m")
    assert (padded.config.ffn_hidden_size, padded.config.unpadded_ffn_hidden_size) == (172 if tp == 4 else 176, 170)
    assert (padded.config.vocab_size, padded.config.unpadded_vocab_size) == (252 if tp == 4 else 256, 250)
    assert padded.config.unpadded == ODD
    assert_same_tensors(tmp_path / "m", weights)
    convert(tmp_path / "m", tmp_path / "other", format="torch", tensor_parallel=2, pipeline_parallel=3)
    assert open_checkpoint(tmp_path / "other").config == ODD
    assert_same_tensors(tmp_path / "other", weights)
    convert(tmp_path / "m", tmp_path / "back", format="hf")
    assert open_checkpoint(tmp_path / "back").config == ODD
    assert_same_tensors(tmp_path / "back", weights)


def test_padding_is_zeros_at_the_end_of_each_half(tmp_path: Path) -> None:
    """The last of 8 ranks holds 22 - 6 rows of gate and of linear, and 6 zeros behind each; as many columns of fc2."""
    weights = distinct_weights(ODD)
    convert(save_hf(tmp_path / "hf", weights, ODD), tmp_path / "m", format="torch", tensor_parallel=8)
    model = torch.load(tmp_path / "m/iter_0000001/mp_rank_07/model_optim_rng.pt", weights_only=False)["model"]
    for kind, dims in (("weight", 2), ("bias", 1)):
        fc1 = model[f"decoder.layers.2.mlp.linear_fc1.{kind}"]
        gate, linear = (weights[f"transformer.h.2.mlp.{name}.{kind}"] for name in ("c_fc2", "c_fc"))
        assert fc1.shape == ((44, 64) if dims == 2 else (44,))
        assert torch.equal(fc1[:16], gate[..., 154:].t() if dims == 2 else gate[154:])
        assert torch.equal(fc1[22:38], linear[..., 154:].t() if dims == 2 else linear[154:])
        assert not fc1[16:22].any()
        assert not fc1[38:].any()
    fc2 = model["decoder.layers.2.mlp.linear_fc2.weight"]
    assert torch.equal(fc2[:, :16], weights["transformer.h.2.mlp.c_proj.weight"][154:].t())
    assert not fc2[:, 16:].any()
    assert not model["embedding.word_embeddings.weight"][26:].any()


def test_padding_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    """It would be lost on the way back."""
    hf = save_hf(tmp_path / "hf", distinct_weights(ODD), ODD)
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=8)
    file = tmp_path / "m/iter_0000001/mp_rank_07/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.layers.2.mlp.linear_fc2.weight"][3, 20] = 1
    torch.save(content, file)
    with pytest.raises(InputError, match=r"padding of tensor transformer\.h\.2\.mlp\.c_proj\.weight is not zero"):
        convert(tmp_path / "m", tmp_path / "back", format="hf")
    assert not (tmp_path / "back").exists()


def test_vocabulary_that_another_writer_padded(tmp_path: Path) -> None:
    """Megatron-LM pads to a multiple of --make-vocab-size-divisible-by times TP; --true-vocab-size trims."""
    weights = distinct_weights(TINY)
    hf = save_hf(tmp_path / "hf", weights)
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=2, vocab_divisor=96)
    assert open_checkpoint(tmp_path / "m").config.vocab_size == 384
    for rank in range(2):  # as others write it: nothing is said of the smaller size, and the rows are not zero
        file = tmp_path / f"m/iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["args"].vocab_size = content["args"].padded_vocab_size
        content["model"]["embedding.word_embeddings.weight"][-64:] += rank
        torch.save(content, file)
    assert open_checkpoint(tmp_path / "m").config.vocab_size == 384
    assert open_checkpoint(tmp_path / "m").config.unpadded_vocab_size is None
    convert(tmp_path / "m", tmp_path / "back", format="hf", true_vocab_size=256)
    assert_same_tensors(tmp_path / "back", weights)
    with pytest.raises(InputError, match="384 rows, fewer than the 500"):
        convert(tmp_path / "m", tmp_path / "no", format="hf", true_vocab_size=500)


@pytest.mark.parametrize("format_", ["torch", "legacy", "torch_dist"])
@pytest.mark.parametrize(
    ("pp", "virtual", "stage_layers"), [(2, 3, None), (3, None, (1, 4, 1)), (2, 2, (4, 2)), (4, None, (3, 0, 1, 2))]
)
def test_virtual_and_uneven_pipelines(
    tmp_path: Path, format_: str, pp: int, virtual: int | None, stage_layers: tuple[int, ...] | None
) -> None:
    weights = distinct_weights(ODD)
    hf = save_hf(tmp_path / "hf", weights, ODD)
    convert(
        hf,
        tmp_path / "m",
        format=format_,
        tensor_parallel=2,
        pipeline_parallel=pp,
        virtual_pipeline=virtual,
        stage_layers=stage_layers,
    )
    written = open_checkpoint(tmp_path / "m")
    assert written.layout == make_layout(ODD, 2, pp, virtual or 1, stage_layers)
    assert_same_tensors(tmp_path / "m", weights)
    convert(tmp_path / "m", tmp_path / "again", format="torch", tensor_parallel=1)
    assert open_checkpoint(tmp_path / "again").layout == replace(written.layout, tensor_parallel=1)
    convert(tmp_path / "again", tmp_path / "back", format="hf")
    assert_same_tensors(tmp_path / "back", weights)


def test_a_virtual_stage_holds_its_chunks(tmp_path: Path) -> None:
    """PP2 with three chunks each: stage 1 holds layers 1, 3, 5, numbered 0 in model0, model1, model2."""
    weights = distinct_weights(ODD)
    hf = save_hf(tmp_path / "hf", weights, ODD)
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=1, pipeline_parallel=2, virtual_pipeline=3)
    content = torch.load(tmp_path / "m/iter_0000001/mp_rank_00_001/model_optim_rng.pt", weights_only=False)
    assert content["args"].virtual_pipeline_model_parallel_size == 3
    for chunk, layer in enumerate((1, 3, 5)):
        norm = content[f"model{chunk}"]["decoder.layers.0.input_layernorm.weight"]
        assert torch.equal(norm, weights[f"transformer.h.{layer}.ln_1.weight"])
    assert "output_layer.weight" in content["model2"]
    assert "output_layer.weight" not in content["model1"]


_LAYOUTS: list[tuple[dict[str, Any], int, int]] = [
    ({}, 3, 1),
    ({"num_layers_in_first_pipeline_stage": 2}, 3, 1),
    ({"num_layers_in_last_pipeline_stage": 2}, 3, 1),
    ({"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 1}, 5, 1),
    ({}, 3, 2),
    ({"num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 4}, 4, 2),
    ({"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}, 2, 1),
    ({"pipeline_model_parallel_layout": "Et|(tt|)*4ttt|L"}, 7, 1),
    ({"pipeline_model_parallel_layout": "Ett|t*3|t|ttttttL"}, 2, 2),
]


@pytest.mark.parametrize(("facts", "pp", "virtual"), _LAYOUTS)
def test_layouts_are_those_of_megatron_core(
    facts: dict[str, Any], pp: int, virtual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers a stage holds, against megatron-core's own functions; then the same through `args` and back."""
    from megatron.core import parallel_state
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    virtual_size = virtual if virtual > 1 else None
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual_size)
    drawing = facts.get("pipeline_model_parallel_layout")
    layers = 12
    core = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=virtual_size,
        pipeline_dtype=torch.float32,
        **({**facts, "pipeline_model_parallel_layout": PipelineParallelLayerLayout(drawing, pp)} if drawing else facts),
    )
    args = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=pp)
    args.virtual_pipeline_model_parallel_size = core.virtual_pipeline_model_parallel_size
    for name, value in facts.items():
        setattr(
            args, name.replace("num_layers_in_", "decoder_").replace("_pipeline_stage", "_pipeline_num_layers"), value
        )
    config = replace(TINY, num_layers=layers)
    layout = layout_of(args, config, Path("args"))  # type: ignore[arg-type]
    for stage in range(pp):
        for virtual_rank, chunk in enumerate(layout.chunks(stage)):
            vp_stage = virtual_rank if virtual > 1 else None
            if drawing:
                drawn = core.pipeline_model_parallel_layout.get_layer_id_list(vp_stage=virtual_rank, pp_rank=stage)
                assert list(layout.layers(chunk)) == drawn
            else:
                first = get_transformer_layer_offset(core, vp_stage, pp_rank=stage)
                count = get_num_layers_to_build(core, vp_stage, pp_rank=stage)
                assert list(layout.layers(chunk)) == list(range(first, first + count))
    written = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=pp, **layout_args(layout))
    assert layout_of(written, config, Path("args")) == layout  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 1, None), "pipeline parallel size 4 does not divide the 6 layers"),
        ((2, 2, 2, None), "times virtual size 2 does not divide the 6 layers"),
        ((2, 1, 2, None), "needs a pipeline-parallel size above 1"),
        ((2, 2, 1, (1, 2, 3)), r"1\+2\+3: names 3 stages"),
        ((2, 2, 1, (1, 2)), "these are 3 layers, but the model has 6"),
        ((2, 2, 2, (3, 3)), "virtual size 2 does not divide every stage's layers"),
    ],
)
def test_layouts_that_do_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_layout(ODD, *arguments)


def test_tensor_parallel_size_that_does_not_divide_the_heads(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights(ODD), ODD)
    with pytest.raises(InputError, match="16 does not divide the attention heads"):
        convert(hf, tmp_path / "m", format="torch", tensor_parallel=16)


def test_layout_of_args_and_weights_of_different_checkpoints() -> None:
    args = SimpleNamespace(**layout_args(Layout(1, 2, (3, 2, 1, 0))), tensor_model_parallel_size=1)
    args.pipeline_model_parallel_size = 2
    model: ModelConfig = replace(TINY, num_layers=5)
    with pytest.raises(InputError, match="args and weights are not of one checkpoint"):
        layout_of(args, model, Path("args"))  # type: ignore[arg-type]
