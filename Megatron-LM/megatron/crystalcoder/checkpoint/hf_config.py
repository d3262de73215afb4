"""The Hugging Face config.json and `ModelConfig`, both directions."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, MuP

# What this model is, whatever its size: any other value is another architecture.
_FIXED = {
    "activation_function": "swiglu",
    "position_embedding_type": "rotary",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def packaged_directory() -> Path:
    """The CrystalCoder package: config.json, model code and (where built) tokenizer that go with every export."""
    spec = find_spec("CrystalCoder")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the CrystalCoder package is not installed: run `make install` or pip install -e .")
    return Path(next(iter(spec.submodule_search_locations)))


def resolve_hf_config_path(value: str) -> Path:
    """The directory that --hf-config-path means: one on disk, or the packaged one for the name `CrystalCoder`."""
    for path in (Path(value), packaged_directory() if value == "CrystalCoder" else None):
        if path is not None and (path / "config.json").is_file():
            return path
    raise InputError(
        f"--hf-config-path (--hf-config) {value}: holds no config.json: give a Hugging Face directory or CrystalCoder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or InputError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def from_hf(values: dict[str, Any], where: Path) -> ModelConfig:
    """`ModelConfig` from config.json's content. `n_inner` null means 4h, `rotary_dim` null the whole head."""
    for key, expected in _FIXED.items():
        if values.get(key, expected) != expected:
            raise InputError(f"{where}: {key} is {values[key]!r}, but a CrystalCoder has {expected!r}")
    try:
        hidden, heads = int(values["n_embd"]), int(values["n_head"])
        return ModelConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            num_layers=int(values["n_layer"]),
            num_attention_heads=heads,
            ffn_hidden_size=int(values.get("n_inner") or 4 * hidden),
            rotary_dim=int(values.get("rotary_dim") or hidden // heads),
            max_sequence_length=int(values["n_positions"]),
            layernorm_epsilon=float(values.get("layer_norm_epsilon", 1e-5)),
            rotary_base=float(values.get("rope_theta", 10000.0)),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", True)),
            mup=MuP(
                width_scale=float(values.get("mup_width_scale", 1.0)),
                output_alpha=float(values.get("mup_output_alpha", 1.0)),
                embeddings_scale=float(values.get("mup_embeddings_scale", 1.0)),
                scale_qk_dot_by_d=bool(values.get("mup_scale_qk_dot_by_d", False)),
            ),
        )
    except KeyError as error:
        raise InputError(f"{where}: key {error} is missing: is this a CrystalCoder config.json?") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where}: {error}") from error


def hf_values(config: ModelConfig) -> dict[str, Any]:
    """The config.json keys that a `ModelConfig` decides; all others come from a template."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_sequence_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rotary_base,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "mup_width_scale": config.mup.width_scale,
        "mup_output_alpha": config.mup.output_alpha,
        "mup_embeddings_scale": config.mup.embeddings_scale,
        "mup_scale_qk_dot_by_d": config.mup.scale_qk_dot_by_d,
    }
