"""A LoRA adapter on disk, as PEFT writes and reads it, and how it is merged into a checkpoint.

    adapter_config.json            rank, alpha, which layers
    adapter_model.safetensors      base_model.model.<layer>.lora_A.weight [r, in], ....lora_B.weight [out, r]

The adapted weight is W + alpha / r * B A (Hu et al. 2021, "LoRA"). `Conv1D` stores W as [in, out] (fan_in_fan_out).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Files
from megatron.crystalcoder.checkpoint.hf_reader import open_hf
from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.model.lora import LoraSettings, target_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The folder of an iteration that holds its adapter.
ADAPTER = "adapter"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """Both matrices of every adapted layer: Hugging Face module name -> (A [r, in], B [out, r]), fp32."""

    settings: LoraSettings
    matrices: Mapping[str, tuple[Tensor, Tensor]]


def write_adapter(folder: Path, adapter: Adapter, base: Path) -> None:
    """Write both files into `folder`, which is made. `base` is recorded as where the adapted model is."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in adapter.matrices.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.float().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.settings.rank,
        "lora_alpha": adapter.settings.alpha,
        "target_modules": list(adapter.settings.targets),
        "fan_in_fan_out": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Read an adapter of this model. Raises InputError when it is none, is damaged, or belongs to other sizes."""
    try:
        content = json.loads((folder / CONFIG).read_text())
        settings = LoraSettings(content["r"], content["lora_alpha"], tuple(content["target_modules"]))
        tensors = load_file(folder / WEIGHTS)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({error.strerror}): is it an adapter?") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: is not a whole LoRA adapter ({error!r}): copy it again") from None
    matrices = {}
    for layer in range(config.num_layers):
        for target in settings.targets:
            name = f"transformer.h.{layer}.{target}"
            fan_in, fan_out = target_shape(config, target)
            absent = torch.empty(0)
            a, b = (tensors.pop(f"{_PREFIX}{name}.lora_{which}.weight", absent) for which in "AB")
            if (a.shape, b.shape) != ((settings.rank, fan_in), (fan_out, settings.rank)):
                raise InputError(
                    f"{folder}: the adapter of {name} is {tuple(a.shape)} and {tuple(b.shape)}, not "
                    f"{(settings.rank, fan_in)} and {(fan_out, settings.rank)}: it belongs to another model"
                )
            matrices[name] = (a, b)
    if tensors:
        raise InputError(f"{folder}: holds {min(tensors)}, which this model has not: it belongs to another model")
    return Adapter(settings, matrices)


def merge_into(directory: Path, adapter: Adapter) -> None:
    """Add the adapter to the weights of a Hugging Face checkpoint, in its files: one tensor in memory at a time."""
    weights = open_hf(directory)
    with Files(writable=True) as files:
        for name, (a, b) in adapter.matrices.items():
            weight = weights.read(f"{name}.weight")
            merged = (weight.float() + adapter.settings.scale * (b @ a).t()).to(weight.dtype)
            (block,) = weights.stored[f"{name}.weight"].copies[0]
            files.write(block.file, block.offset, merged.contiguous().flatten().view(torch.uint8).numpy())
