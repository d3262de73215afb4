"""CrystalCoder on megatron-core's GPTModel.

    x = E[token] * embeddings_scale
    x = x + Attn(LN(x));  x = x + MLP(LN(x))          per layer; every linear has a bias
    logits = (LN(x) E^T) * output_scale

Interleaved rotary on the first `rotary_dim` of each head's dims, scores scaled by 1/d, SwiGLU, tied head: all of it is
megatron-core configuration but the two muP factors. Which parts run fused is told by `Speed`; none changes the result.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.isolation import turn_by_given_positions
from megatron.crystalcoder.model.kernels.fp8 import check_fp8
from megatron.crystalcoder.model.kernels.loss import cross_entropy
from megatron.crystalcoder.model.kernels.rotary import RotaryTable
from megatron.crystalcoder.model.layer import await_parameters
from megatron.crystalcoder.model.layer_spec import CoreConfig, crystalcoder_block_spec
from megatron.crystalcoder.model.offload import OffloadSaved


def transformer_config(
    config: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    speed: Speed | None = None,
) -> CoreConfig:
    """megatron-core's description of the model. Raises InputError when the layout does not split the model, or this
    machine has no fp8 products for it."""
    config.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if speed is not None and speed.fp8 != "off":
        tp = parallel.tensor_model_parallel_size
        sizes = {"hidden size": config.hidden_size // tp, "FFN hidden size": config.ffn_hidden_size // tp}
        check_fp8(emulated=speed.fp8 == "emulated", sizes=sizes)
    recompute: dict[str, Any] = {}
    if parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    elif parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return CoreConfig(
        speed=(speed or Speed()).resolved(cuda=torch.cuda.is_available()),
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
        cuda_graph_scope=[],
        deallocate_pipeline_outputs=True,
        **recompute,
    )


class CrystalCoderGPT(GPTModel):
    """megatron-core's GPTModel with the muP factors and, where they are on, the fused rotary table and loss.

    `model(tokens_bs, position_ids_bs, None, labels=labels_bs)` gives the fp32 loss per token (b, s) on the last stage;
    without labels, the logits (b, s, v / tensor parallel size). In the place of None may stand each token's
    document number (b, s): then attention stays within documents and rotary follows `position_ids_bs` (isolation.py).
    """

    def __init__(self, config: ModelConfig, core: CoreConfig) -> None:
        # megatron-core takes int(head_dim * percent); half a dim more keeps that product from falling below rotary_dim.
        percent = 1.0 if config.rotary_dim == config.head_dim else (config.rotary_dim + 0.5) / config.head_dim
        super().__init__(
            core,
            crystalcoder_block_spec(core),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=True,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=percent,
            rotary_base=config.rotary_base,
        )
        self.mup = config.mup
        if "rotary" in core.speed.fusions:
            self.rotary_pos_emb = RotaryTable(
                config.head_dim,
                percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=config.rotary_base,
                dtype=core.params_dtype,
            )
        if self.pre_process:
            self.embedding.register_forward_hook(self._scale_embeddings)
        if self.post_process:
            self.output_layer.register_forward_hook(self._scale_logits)
        turn_by_given_positions(self)
        if core.speed.offload:
            self._offload_saved()

    def _offload_saved(self) -> None:
        forward, offloading = self.decoder.forward, OffloadSaved()

        def call(*args: Any, **kwargs: Any) -> Any:
            with offloading:
                return forward(*args, **kwargs)

        self.decoder.forward = call

    def _scale_embeddings(self, module: torch.nn.Module, inputs: Any, embeddings_sbh: Tensor) -> Tensor:
        return embeddings_sbh * self.mup.embeddings_scale

    def _scale_logits(self, module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits_sbv, bias = output
        return logits_sbv * self.mup.output_scale, bias

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if labels is None or not self.post_process or "loss" not in self.config.speed.fusions:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        return self._fused_loss(hidden_states, labels)

    def _fused_loss(self, hidden_sbh: Tensor, labels_bs: Tensor) -> Tensor:
        group = self.pg_collection.tp
        if group.size() > 1:
            if self.config.sequence_parallel:
                hidden_sbh = gather_from_sequence_parallel_region(hidden_sbh, group=group)
            else:
                hidden_sbh = copy_to_tensor_model_parallel_region(hidden_sbh, group=group)
        s, b, h = hidden_sbh.shape
        tied = self.share_embeddings_and_output_weights
        await_parameters(self.output_layer)
        losses_t = cross_entropy(
            hidden_sbh.reshape(s * b, h),
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels_bs.t().reshape(s * b),
            scale=self.mup.output_scale,
            group=group,
            chunk=self.config.speed.loss_chunk,
            # Whoever recomputes layers to save memory would not keep the logits either.
            keep_logits=self.config.recompute_granularity != "full",
            compiled=self.config.speed.compiles_ops,
        )
        return losses_t.view(s, b).t().contiguous()


def build_model(
    config: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype = torch.float32, speed: Speed | None = None
) -> CrystalCoderGPT:
    """This rank's pipeline stage of the model, on this rank's device.

    Needs `platform.initialize_model_parallel(parallel)` before. Its matrices are NaN until weights are loaded: there is
    no path on which a model trains from weights that nobody chose.
    """
    return CrystalCoderGPT(config, transformer_config(config, parallel, dtype, speed))


def _fill_with_nan(weight: Tensor) -> Tensor:
    """Stand in for an init method: a weight that nobody loads must not pass for one that somebody did."""
    return torch.nn.init.constant_(weight, float("nan"))
