"""CrystalCoder on megatron-core's GPTModel.

    x = E[token] * embeddings_scale
    x = x + Attn(LN(x));  x = x + MLP(LN(x))          per layer; every linear has a bias
    logits = (LN(x) E^T) * output_scale

Interleaved rotary on the first `rotary_dim` of each head's dims, scores scaled by 1/d, SwiGLU, tied head: all of it is
megatron-core configuration but the two muP factors, which are forward hooks on the embedding and on the output layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.isolation import turn_by_given_positions
from megatron.crystalcoder.model.layer_spec import crystalcoder_block_spec


def transformer_config(
    config: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    """megatron-core's description of the model. Raises InputError when the layout does not split the model."""
    config.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    recompute: dict[str, Any] = {}
    if parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    elif parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
        embedding_init_method=_fill_with_nan,
        normalization="LayerNorm",
        layernorm_epsilon=config.layernorm_epsilon,
        add_bias_linear=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=config.rotary_interleaved,
        softmax_scale=config.softmax_scale,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        **recompute,
    )


def build_model(config: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype = torch.float32) -> GPTModel:
    """This rank's pipeline stage of the model, on this rank's device.

    Needs `platform.initialize_model_parallel(parallel)` before. Its matrices are NaN until weights are loaded: there is
    no path on which a model trains from weights that nobody chose.

    `model(tokens_bs, position_ids_bs, None, labels=labels_bs)` gives the fp32 loss per token (b, s) on the last stage;
    without labels, the logits (b, s, v / tensor parallel size). In the place of None may stand each token's
    document number (b, s): then attention stays within documents and rotary follows `position_ids_bs` (isolation.py).
    """
    core_config = transformer_config(config, parallel, dtype)
    # megatron-core takes int(head_dim * percent); half a dim more keeps that product from falling below rotary_dim.
    rotary_percent = 1.0 if config.rotary_dim == config.head_dim else (config.rotary_dim + 0.5) / config.head_dim
    model = GPTModel(
        core_config,
        crystalcoder_block_spec(core_config),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=rotary_percent,
        rotary_base=config.rotary_base,
    )
    _install_mup(model, config)
    turn_by_given_positions(model)
    return model


def _install_mup(model: GPTModel, config: ModelConfig) -> None:
    """Scale the embedding's output on the first stage and the logits on the last."""
    embeddings_scale, output_scale = config.mup.embeddings_scale, config.mup.output_scale

    def scale_embeddings(module: torch.nn.Module, inputs: Any, embeddings_sbh: Tensor) -> Tensor:
        return embeddings_sbh * embeddings_scale

    def scale_logits(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits_sbv, bias = output
        return logits_sbv * output_scale, bias

    if model.pre_process:
        model.embedding.register_forward_hook(scale_embeddings)
    if model.post_process:
        model.output_layer.register_forward_hook(scale_logits)


def _fill_with_nan(weight: Tensor) -> Tensor:
    """Stand in for an init method: a weight that nobody loads must not pass for one that somebody did."""
    return torch.nn.init.constant_(weight, float("nan"))
