"""Convert a checkpoint: any readable format to any writable one, any TP and PP, without a model and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.directory import (
    HF_FILES,
    iteration_directory,
    new_directory,
    write_tracker,
)
from megatron.crystalcoder.checkpoint.hf_config import from_hf, hf_values, packaged_directory, read_json
from megatron.crystalcoder.checkpoint.hf_writer import TOKENIZER_FILES, write_code, write_companions, write_weights
from megatron.crystalcoder.checkpoint.megatron_args import to_args
from megatron.crystalcoder.checkpoint.open import Checkpoint, open_checkpoint
from megatron.crystalcoder.checkpoint.torch_dist_writer import write_torch_dist
from megatron.crystalcoder.checkpoint.torch_writer import write_torch
from megatron.crystalcoder.checkpoint.verify import Cast, check_equal
from megatron.crystalcoder.model.config import ModelConfig

TargetFormat = Literal["hf", "torch", "torch_dist"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Converted weights are nobody's iteration; the number only names the directory, as the reference's converter does.
_ITERATION = 1


def convert(
    source: Path,
    target: Path,
    *,
    format: TargetFormat,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Write the weights of `source` to the new directory `target`.

    tensor_parallel, pipeline_parallel: of a Megatron target (default: the source's). `torch_dist` loads at any; there
    they are what training takes when it is not told otherwise.
    dtype: cast to it; None keeps what is stored. hf_config: see `settle_config`.
    verify: read the result back and compare every tensor bit for bit, before it gets its name.
    Memory: a few times the largest tensor, whatever the model's size. Raises InputError and leaves nothing behind.
    """
    checkpoint = open_checkpoint(source)
    config, template = settle_config(checkpoint, hf_config)
    if format == "hf" and not config.rotary_interleaved:
        raise InputError(f"{source}: rotary_interleaved is off, which the Hugging Face model cannot express")
    tp_size = tensor_parallel or checkpoint.tensor_parallel
    pp_size = pipeline_parallel or checkpoint.pipeline_parallel
    if format != "hf":
        config.check_layout(tp_size, pp_size)
    weights = Cast(checkpoint.weights, dtype, str(source))
    stored = weights.dtype("transformer.wte.weight")
    files_from = tokenizer_directory(checkpoint, hf_config)
    report(f"{source}: {checkpoint.format}, {config.num_parameters:,} parameters")
    with new_directory(target, overwrite=overwrite) as partial:
        if format == "hf":
            write_weights(partial, weights)
            write_companions(partial, config, template, files_from, stored)
            write_code(partial)
        else:
            folder = iteration_directory(partial, _ITERATION)
            args = to_args(config, tp_size, pp_size, dtype=stored, converted=True, iteration=_ITERATION)
            if format == "torch":
                write_torch(folder, weights, config, args, _ITERATION, tp_size, pp_size)
            else:
                write_torch_dist(folder, weights, config, args, _ITERATION)
            (partial / HF_FILES).mkdir()
            write_companions(partial / HF_FILES, config, template, files_from, stored)
            write_tracker(partial, _ITERATION)
        if verify:
            written = open_checkpoint(partial)
            if written.config != config:
                raise RuntimeError(f"{target}: the configuration was not written as it was read")
            check_equal(written.weights, weights, target)
    layout = f" TP{tp_size} PP{pp_size}" if format != "hf" else ""
    checked = ", every tensor read back and equal" if verify else ""
    report(f"{target}: {format}{layout}, {str(stored).removeprefix('torch.')}{checked}")
    if files_from is None:
        report(f"note: {source} carries no tokenizer files, so {target} has none; add them beside config.json")


def settle_config(checkpoint: Checkpoint, hf_config: Path | None) -> tuple[ModelConfig, dict[str, Any]]:
    """What the model is, and the template for the config.json keys that a checkpoint does not tell.

    The checkpoint's own record always counts. The packaged config.json (the 7B model's) is a template for any model. A
    config.json of the user's speaks of this very model, so it must not contradict the checkpoint. Only where the
    checkpoint does not record muP (the reference's converter) do the constants come from config.json, which must then
    be that of a model of the same sizes.
    """
    packaged = read_json(packaged_directory() / "config.json")
    carried = read_json(checkpoint.hf_files / "config.json") if checkpoint.hf_files else {}
    if hf_config is None:
        if not checkpoint.mup_recorded:
            raise InputError(
                f"{checkpoint.path}: does not record the muP constants: pass the Hugging Face directory of this model "
                "(its config.json has them) as --hf-config-path"
            )
        return checkpoint.config, packaged | carried
    given = read_json(hf_config / "config.json")
    if checkpoint.mup_recorded and given == packaged:
        return checkpoint.config, packaged | carried
    described = from_hf(given, hf_config / "config.json")
    recorded = checkpoint.config
    if not checkpoint.mup_recorded:
        recorded = replace(recorded, mup=described.mup, layernorm_epsilon=described.layernorm_epsilon)
    theirs = hf_values(described)
    for key, value in hf_values(recorded).items():
        # Rotary has no table of positions, so that length is a habit and no property of the weights.
        if key != "n_positions" and theirs[key] != value:
            raise InputError(
                f"{hf_config / 'config.json'}: says {key} {theirs[key]}, but {checkpoint.path} has "
                f"{value}: pass the config.json of this model"
                + (" (the muP constants are taken from it)" if not checkpoint.mup_recorded else ", or none")
            )
    return recorded, packaged | carried | given


def tokenizer_directory(checkpoint: Checkpoint, hf_config: Path | None) -> Path | None:
    """Where the tokenizer files come from: the --hf-config-path directory, else what the checkpoint carries."""
    for directory in (hf_config, checkpoint.hf_files, packaged_directory()):
        if directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES):
            return directory
    return None
