"""The `args` Namespace of a Megatron checkpoint: what the model is, under the names that Megatron-LM gives it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, MuP

CHECKPOINT_VERSION = 3.0  # qkv rows are grouped by head: [heads, 3, d]

# What a CrystalCoder is in Megatron's terms. A checkpoint that says otherwise is another architecture.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "LayerNorm",
    "swiglu": True,
    "add_bias_linear": True,
    "group_query_attention": False,
    "num_experts": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
}


def to_args(
    config: ModelConfig,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    converted: bool = False,
    **facts: Any,
) -> argparse.Namespace:
    """Everything that a checkpoint must tell about its model; muP, rotary style and norm epsilon always included.

    converted: the weights come from a converter, not from training here: a run that starts from them begins at
    iteration 0 with all rows. facts: what else the writer wants recorded (consumed_train_samples, seq_length, ...).
    """
    args = argparse.Namespace(
        **_FIXED,
        num_layers=config.num_layers,
        encoder_num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_attention_heads,
        kv_channels=config.head_dim,
        max_position_embeddings=config.max_sequence_length,
        seq_length=config.max_sequence_length,
        encoder_seq_length=config.max_sequence_length,
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        rotary_interleaved=config.rotary_interleaved,
        rotary_interleave_repeat=config.rotary_interleaved,  # the reference's name for the same
        norm_epsilon=config.layernorm_epsilon,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        vocab_size=config.unpadded.vocab_size,
        padded_vocab_size=config.vocab_size,
        unpadded_ffn_hidden_size=config.unpadded_ffn_hidden_size,
        make_vocab_size_divisible_by=1,
        tokenizer_type="NullTokenizer",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # What Megatron-LM takes over from a checkpoint without asking, whatever its own defaults are by then.
        add_qkv_bias=False,  # of a model whose other linears have none
        squared_relu=False,
        apply_query_key_layer_scaling=False,
        use_mup=True,
        mup_width_scale=config.mup.width_scale,
        mup_output_alpha=config.mup.output_alpha,
        mup_embeddings_scale=config.mup.embeddings_scale,
        mup_scale_qk_dot_by_d=config.mup.scale_qk_dot_by_d,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=None,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_mcore_models=True,
        transformer_impl="local",
        converted=converted,
        # Megatron-LM then does not ask for optimizer and random states.
        no_save_optim=converted,
        no_save_rng=converted,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    vars(args).update(facts)
    return args


def mup_is_recorded(args: argparse.Namespace) -> bool:
    """Whether muP constants and rotary style in `args` can be trusted.

    The reference's converter leaves them all at defaults with `use_mup` False, whatever the model; its trainer and this
    kit set `use_mup`.
    """
    return bool(getattr(args, "use_mup", False))


def from_args(args: argparse.Namespace, where: Path) -> ModelConfig:
    """`ModelConfig` from a checkpoint's args. Raises InputError for another architecture or missing sizes.

    Where muP is not recorded (`mup_is_recorded`), the constants are the neutral ones and rotary is interleaved; the
    caller must put in the right constants.
    """
    values = vars(args)
    for name, expected in _FIXED.items():
        if values.get(name, expected) != expected:
            raise InputError(f"{where}: args.{name} is {values[name]!r}, but a CrystalCoder has {expected!r}")
    try:
        hidden, heads = int(args.hidden_size), int(args.num_attention_heads)
        head_dim = int(values.get("kv_channels") or hidden // heads)
        if head_dim * heads != hidden:
            raise InputError(f"{where}: args.kv_channels {head_dim} is not hidden size / attention heads")
        recorded = mup_is_recorded(args)
        is_ours = "unpadded_ffn_hidden_size" in values
        interleaved = values.get("rotary_interleaved", values.get("rotary_interleave_repeat", True))
        return ModelConfig(
            vocab_size=int(values.get("padded_vocab_size") or args.vocab_size),
            hidden_size=hidden,
            num_layers=int(args.num_layers),
            num_attention_heads=heads,
            ffn_hidden_size=int(args.ffn_hidden_size),
            rotary_dim=round(head_dim * float(args.rotary_percent)),
            max_sequence_length=int(args.max_position_embeddings),
            layernorm_epsilon=float(values.get("norm_epsilon", 1e-5)),
            rotary_base=float(values.get("rotary_base") or 10000.0),
            rotary_interleaved=bool(interleaved) if recorded else True,
            tie_word_embeddings=not values.get("untie_embeddings_and_output_weights", False),
            mup=MuP(
                width_scale=float(args.mup_width_scale),
                output_alpha=float(args.mup_output_alpha),
                embeddings_scale=float(args.mup_embeddings_scale),
                scale_qk_dot_by_d=bool(args.mup_scale_qk_dot_by_d),
            )
            if recorded
            else MuP(),
            # Of other writers' checkpoints `vocab_size` says what the tokenizer had, which need not be the model's.
            unpadded_vocab_size=_smaller(values.get("vocab_size"), args.padded_vocab_size) if is_ours else None,
            unpadded_ffn_hidden_size=values.get("unpadded_ffn_hidden_size"),
        )
    except AttributeError as error:
        raise InputError(f"{where}: args has no `{error.name}`: this is not a GPT checkpoint of Megatron") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error


def _smaller(own: int | None, padded: int) -> int | None:
    return own if own is not None and own < padded else None
