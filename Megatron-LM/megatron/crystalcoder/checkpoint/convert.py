"""Convert a checkpoint: any readable format to any writable one, any TP and PP, without a model and without a GPU."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.companions import (
    TOKENIZER_FILES,
    companion_files,
    settle_config,
    write_code,
    write_companions,
)
from megatron.crystalcoder.checkpoint.directory import (
    HF_FILES,
    RELEASE,
    iteration_directory,
    new_directory,
    write_tracker,
)
from megatron.crystalcoder.checkpoint.hf_writer import lay_out_hf
from megatron.crystalcoder.checkpoint.hub import open_source
from megatron.crystalcoder.checkpoint.layout import Layout, layout_args, make_layout
from megatron.crystalcoder.checkpoint.logits import NUM_PROMPTS, compare_logits, refuse_other_logits
from megatron.crystalcoder.checkpoint.megatron_args import to_args
from megatron.crystalcoder.checkpoint.model_card import CARD, write_model_card
from megatron.crystalcoder.checkpoint.open import Checkpoint, open_checkpoint
from megatron.crystalcoder.checkpoint.placement import combined
from megatron.crystalcoder.checkpoint.progress import progress_bar
from megatron.crystalcoder.checkpoint.tensor_files import Inert, describe_torch
from megatron.crystalcoder.checkpoint.torch_dist_reader import COMMON, open_optimizer
from megatron.crystalcoder.checkpoint.torch_dist_writer import lay_out_torch_dist
from megatron.crystalcoder.checkpoint.torch_reader import Names
from megatron.crystalcoder.checkpoint.torch_writer import lay_out_torch
from megatron.crystalcoder.checkpoint.transfer import MAX_QUEUE_SIZE, Transfer, default_workers
from megatron.crystalcoder.checkpoint.weights import DTypes, logical_shapes
from megatron.crystalcoder.model.config import ModelConfig

TargetFormat = Literal["hf", "torch", "torch_dist", "legacy"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Converted weights are nobody's iteration; the number only names the directory, as the reference's converter does.
_ITERATION = 1


def convert(
    source: Path | str,
    target: Path,
    *,
    format: TargetFormat,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
    virtual_pipeline: int | None = None,
    stage_layers: tuple[int, ...] | None = None,
    vocab_divisor: int = 1,
    true_vocab_size: int | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    release: bool = False,
    hf_config: Path | None = None,
    tokenizer: Path | None = None,
    fused_norms: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    logits: bool = True,
    workers: int | None = None,
    max_queue_size: int = MAX_QUEUE_SIZE,
    report: Callable[[str], None] = print,
) -> None:
    """Write the weights of `source`, a directory or a name on the hub, to the new directory `target`.

    tensor_parallel, pipeline_parallel, virtual_pipeline: of a Megatron target (default: the source's). `torch_dist`
    loads at any; there they are what training takes when it is not told otherwise. stage_layers: layers of each
    pipeline stage, where it is uneven. vocab_divisor: pad the vocabulary to a multiple of this times the
    tensor-parallel size.
    true_vocab_size: the vocabulary without the padding that another writer gave it.
    iteration: which of a run's checkpoints; None: its last.
    dtype: cast to it; None keeps what is stored. release: written as Megatron's `release`, without an iteration.
    hf_config: see `settle_config`. tokenizer: see `companion_files`. fused_norms: in format `torch`, name the norms as
    layers do that fuse them into the linear behind (Transformer Engine). verify: read every tensor back and compare it
    bit for bit, before the target gets its name. logits: then compare both sides' logits too (without `verify`, neither
    is done). workers: threads.
    max_queue_size: most tensors in work at a time.
    Memory: about two of the largest tensors for each worker, whatever the model's size. Raises InputError and leaves
    nothing behind. A conversion that is killed goes on where it was when it is started again.
    """
    checkpoint = open_source(source, true_vocab_size=true_vocab_size, iteration=iteration)
    if checkpoint.adapter is not None:
        raise InputError(f"{source}: trained an adapter: `crystalcoder finetune export` merges it and writes it alone")
    config, template = settle_config(checkpoint, hf_config)
    if format == "hf" and not config.rotary_interleaved:
        raise InputError(f"{source}: rotary_interleaved is off, which the Hugging Face model cannot express")
    if fused_norms and format != "torch":
        raise InputError(
            f"format {format} names the norms in one way only: drop the flag of Transformer Engine's names"
        )
    layout = None
    if format != "hf":
        config, layout = _target_layout(
            checkpoint, config, tensor_parallel, pipeline_parallel, virtual_pipeline, stage_layers, vocab_divisor
        )
    else:
        config = config.unpadded
    sets = {"": checkpoint.weights}
    if checkpoint.format == format == "torch_dist" and not release:
        sets |= open_optimizer(checkpoint.folder, checkpoint.config)
    if dtype is not None and len(sets) > 1:
        raise InputError(f"{source}: --dtype casts weights and not optimizer state: add --release to leave that behind")
    everything = combined(sets)
    dtypes = {name: dtype or entry.dtype for name, entry in everything.stored.items()}
    needed = sum(torch.Size(x.shape).numel() * dtypes[name].itemsize for name, x in everything.stored.items())
    companions = companion_files(checkpoint, hf_config, tokenizer)
    report(f"{source}: {checkpoint.format}, {config.unpadded.num_parameters:,} parameters")
    job = {
        "source": _identity(checkpoint),
        "target": [format, repr(layout), repr(config), {name: str(x) for name, x in dtypes.items()}, release],
    }
    with new_directory(target, overwrite=overwrite, job=job) as partial:
        if not partial.is_laid_out:
            _refuse_full_disk(partial.path, target, needed)
            _lay_out(partial.path, checkpoint, format, config, layout, dtypes, list(sets), release, fused_norms)
            partial.laid_out()
        beside = partial.path if format == "hf" else partial.path / HF_FILES
        beside.mkdir(exist_ok=True)
        write_companions(beside, config.unpadded, template, companions, dtypes["transformer.wte.weight"])
        if format == "hf":
            write_code(partial.path)
            if checkpoint.format == "hf" and (checkpoint.path / CARD).is_file():
                shutil.copyfile(checkpoint.path / CARD, partial.path / CARD)
            else:
                write_model_card(partial.path, target.name, config, dtypes["transformer.wte.weight"])
        written = open_checkpoint(partial.path)
        places = {"": written.weights}
        if len(sets) > 1:
            places |= open_optimizer(written.folder, written.config)
        transfer = Transfer(everything, combined(places), str(source), verify=verify, resume=partial.is_laid_out)
        with progress_bar(transfer.nbytes, target.name) as advance:
            transfer.run(workers=workers or default_workers(), max_queue_size=max_queue_size, progress=advance)
        written = open_checkpoint(partial.path)
        if written.config != config:
            raise RuntimeError(f"{target}: the configuration was not written as it was read")
        if verify and logits:
            difference = compare_logits(checkpoint, written, config.unpadded)
            is_cast = any(dtypes[name] != entry.dtype for name, entry in everything.stored.items())
            refuse_other_logits(difference, is_cast=is_cast, where=target)
    checked = ", every tensor read back and equal" if verify else ""
    stored_dtype = str(dtypes["transformer.wte.weight"]).removeprefix("torch.")
    report(f"{target}: {format}{f' {layout}' if layout else ''}, {stored_dtype}{checked}")
    if len(sets) > 1:
        report(f"with the optimizer state of iteration {checkpoint.iteration}, from which training goes on")
    if verify and logits:
        report(f"logits on {NUM_PROMPTS} prompts: {difference}")
    for line in _padding_notes(config):
        report(line)
    if not set(companions) & set(TOKENIZER_FILES):
        report(f"note: {source} carries no tokenizer, so {target} has none: give one (--tokenizer), or add its files")


def _target_layout(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tensor_parallel: int | None,
    pipeline_parallel: int | None,
    virtual_pipeline: int | None,
    stage_layers: tuple[int, ...] | None,
    vocab_divisor: int,
) -> tuple[ModelConfig, Layout]:
    """The target's layout (the source's where nothing is asked for), and the model padded so that it fits."""
    theirs = checkpoint.layout
    tp_size = tensor_parallel or checkpoint.tensor_parallel
    if config.num_attention_heads % tp_size:
        heads = config.num_attention_heads
        usable = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        # All that must divide: the FFN and the vocabulary are padded.
        raise InputError(
            f"tensor parallel size {tp_size} does not divide the attention heads ({heads}): use one of {usable}"
        )
    own = config.unpadded
    config = config.padded(_multiple(own.vocab_size, vocab_divisor * tp_size), _multiple(own.ffn_hidden_size, tp_size))
    unchanged = pipeline_parallel in (None, checkpoint.pipeline_parallel) and virtual_pipeline is None
    if theirs is not None and stage_layers is None and unchanged:
        return config, replace(theirs, tensor_parallel=tp_size)
    pp_size = pipeline_parallel or (len(stage_layers) if stage_layers else checkpoint.pipeline_parallel)
    return config, make_layout(config, tp_size, pp_size, virtual_pipeline or 1, stage_layers)


def _multiple(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _padding_notes(config: ModelConfig) -> list[str]:
    own = config.unpadded
    notes = []
    if config.ffn_hidden_size != own.ffn_hidden_size:
        notes.append(
            f"note: ffn hidden size {own.ffn_hidden_size} padded with zeros to {config.ffn_hidden_size}; training "
            "keeps them zero, and the way back removes them"
        )
    if config.vocab_size != own.vocab_size:
        notes.append(f"note: vocabulary {own.vocab_size} padded to {config.vocab_size}; the way back removes the rest")
    return notes


def _lay_out(
    folder: Path,
    checkpoint: Checkpoint,
    format: TargetFormat,
    config: ModelConfig,
    layout: Layout | None,
    dtypes: DTypes,
    prefixes: list[str],
    release: bool,
    fused_norms: bool,
) -> None:
    """Make all of the target's files, with zeros for the tensors' values. prefixes: "" and the optimizer state's."""
    if layout is None:
        lay_out_hf(folder, config, dtypes)
        return
    is_run = len(prefixes) > 1
    iteration = checkpoint.iteration if is_run else 0 if release else _ITERATION
    inner = folder / RELEASE if release else iteration_directory(folder, iteration)
    args = to_args(
        config,
        layout.tensor_parallel,
        layout.pipeline_parallel,
        dtype=dtypes["transformer.wte.weight"],
        converted=not is_run,
        iteration=iteration,
        use_mcore_models=format != "legacy",
        ckpt_format="torch_dist" if format == "torch_dist" else "torch",
        transformer_impl="transformer_engine" if fused_norms else "local",
        **layout_args(layout),
    )
    if format == "torch_dist":
        run = _run_state(checkpoint, args) if is_run else {}
        sets = {prefix: {name: dtypes[prefix + name] for name in logical_shapes(config)} for prefix in prefixes}
        lay_out_torch_dist(inner, config, sets, args, iteration, run)
    else:
        names: Names = "legacy" if format == "legacy" else "fused" if fused_norms else "mcore"
        lay_out_torch(inner, config, dtypes, args, iteration, layout, names)
    write_tracker(folder, RELEASE if release else iteration)


def _run_state(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """What common.pt holds of a run beside its weights; `args` takes over what the run has recorded there.

    Random states belong to the ranks of the old layout and stay behind, which `args` says.
    """
    own = vars(args)
    recorded = {k: v for k, v in vars(checkpoint.args).items() if k not in own and not isinstance(v, Inert)}
    for name in ("consumed_train_samples", "consumed_valid_samples", "seq_length"):
        recorded[name] = getattr(checkpoint.args, name, own[name])
    own.update(recorded, has_rng_state=False, no_save_rng=True)
    common = describe_torch(checkpoint.folder / COMMON)
    return {key: common[key] for key in ("optimizer", "opt_param_scheduler", "content_metadata") if key in common}


def _identity(checkpoint: Checkpoint) -> list[Any]:
    """What tells these weights from others: the files they lie in. A name on the hub has its commit in the path."""
    blocks = (block for stored in checkpoint.weights.stored.values() for copy in stored.copies for block in copy)
    files = sorted({block.file.absolute() for block in blocks})
    if checkpoint.is_remote:
        return [str(file) for file in files]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _refuse_full_disk(folder: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{target}: needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: make room, or choose another"
        )
