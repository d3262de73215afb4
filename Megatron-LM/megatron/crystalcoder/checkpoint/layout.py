"""How a model lies over tensor- and pipeline-parallel ranks: even, uneven and virtual pipelines."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel size, and the pipeline's chunks of layers.

    chunk_layers: the number of layers of each chunk, in the order in which a token passes through them. Stage p holds
    the chunks p, p + pipeline_parallel, p + 2 pipeline_parallel, ...: one each, or several in a virtual pipeline.
    """

    tensor_parallel: int
    pipeline_parallel: int
    chunk_layers: tuple[int, ...]

    @property
    def virtual(self) -> int:
        """Chunks a stage; 1: no virtual pipeline."""
        return len(self.chunk_layers) // self.pipeline_parallel

    @property
    def num_chunks(self) -> int:
        """Chunks of all stages."""
        return len(self.chunk_layers)

    def chunks(self, pp_rank: int) -> range:
        """The chunks on a stage."""
        return range(pp_rank, self.num_chunks, self.pipeline_parallel)

    def layers(self, chunk: int) -> range:
        """The chunk's layers, numbered as in the whole model."""
        first = sum(self.chunk_layers[:chunk])
        return range(first, first + self.chunk_layers[chunk])

    @property
    def is_even(self) -> bool:
        """Whether all chunks have as many layers."""
        return len(set(self.chunk_layers)) == 1

    def __str__(self) -> str:
        text = f"TP{self.tensor_parallel} PP{self.pipeline_parallel}"
        if self.virtual > 1:
            text += f" VPP{self.virtual}"
        return text if self.is_even else f"{text} ({'+'.join(map(str, self.chunk_layers))} layers)"


def make_layout(
    config: ModelConfig,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual: int = 1,
    stage_layers: tuple[int, ...] | None = None,
) -> Layout:
    """A layout that the (padded) model fits, or InputError. stage_layers: layers of each pipeline stage, if uneven."""
    chunks = pipeline_parallel * virtual
    if virtual > 1 and pipeline_parallel == 1:
        raise InputError("a virtual pipeline needs a pipeline-parallel size above 1")
    if stage_layers is None:
        if virtual == 1:
            config.check_layout(tensor_parallel, pipeline_parallel)
        elif config.num_layers % chunks:
            raise InputError(
                f"pipeline parallel size {pipeline_parallel} times virtual size {virtual} does not divide the "
                f"{config.num_layers} layers"
            )
        config.check_layout(tensor_parallel, 1)
        return Layout(tensor_parallel, pipeline_parallel, (config.num_layers // chunks,) * chunks)
    config.check_layout(tensor_parallel, 1)
    named = "+".join(map(str, stage_layers))
    if len(stage_layers) != pipeline_parallel:
        raise InputError(
            f"{named}: names {len(stage_layers)} stages, but the pipeline-parallel size is {pipeline_parallel}"
        )
    if sum(stage_layers) != config.num_layers or min(stage_layers) < 0:
        raise InputError(f"{named}: these are {sum(stage_layers)} layers, but the model has {config.num_layers}")
    if any(layers % virtual for layers in stage_layers):
        raise InputError(f"{named}: virtual size {virtual} does not divide every stage's layers")
    return Layout(tensor_parallel, pipeline_parallel, tuple(layers // virtual for layers in stage_layers) * virtual)


def layout_args(layout: Layout) -> dict[str, Any]:
    """What `args` says of a layout, in Megatron's words: first and last stage where that is all, else a drawing."""
    facts: dict[str, Any] = {
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
    }
    if layout.is_even:
        if layout.virtual > 1:
            facts["num_layers_per_virtual_pipeline_stage"] = layout.chunk_layers[0]
        return facts
    stages = [sum(len(layout.layers(chunk)) for chunk in layout.chunks(p)) for p in range(layout.pipeline_parallel)]
    repeats = layout.chunk_layers == layout.chunk_layers[: layout.pipeline_parallel] * layout.virtual
    if repeats and len(set(stages[1:-1])) <= 1 and min(stages) > 0:
        facts["decoder_first_pipeline_num_layers"] = stages[0]
        facts["decoder_last_pipeline_num_layers"] = stages[-1]
    else:
        drawn = ["t" * layers for layers in layout.chunk_layers]
        facts["pipeline_model_parallel_layout"] = f"E{'|'.join(drawn)}L"
    return facts


def layout_of(args: argparse.Namespace, config: ModelConfig, where: Path) -> Layout:
    """The layout that `args` records, by Megatron's rules. Raises InputError when it does not fit the model."""
    values = vars(args)
    tp, pp = int(values["tensor_model_parallel_size"]), int(values["pipeline_model_parallel_size"])
    vpp = int(values.get("virtual_pipeline_model_parallel_size") or 1)
    if drawing := values.get("pipeline_model_parallel_layout"):
        chunks = tuple(part.count("t") for part in _expanded(str(drawing)).split("|"))
    else:
        first, last = (values.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
        ends = [bool(values.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss")]
        if first is None and last is None:
            each = (config.num_layers + sum(ends)) // (pp * vpp)
            even = [each] * (pp * vpp)
            even[0] -= ends[0]
            even[-1] -= ends[1]
            chunks = tuple(even)
        else:
            middle = pp - (first is not None) - (last is not None)
            rest = config.num_layers - (first or 0) - (last or 0)
            stages = [rest // middle if middle else 0] * middle
            stages = [*([first] if first is not None else []), *stages, *([last] if last is not None else [])]
            chunks = tuple(layers // vpp for layers in stages) * vpp
    if len(chunks) % pp or sum(chunks) != config.num_layers:
        raise InputError(
            f"{where}: args records pipeline parallel size {pp}, which does not divide the {config.num_layers} layers "
            "as its other arguments say: args and weights are not of one checkpoint"
        )
    config.check_layout(tp, 1)
    return Layout(tp, pp, chunks)


def _expanded(drawing: str) -> str:
    """Megatron's shorthand for pipelines written out: E(t|)*3tL is Et|t|t|tL."""
    drawing = drawing.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        drawing = re.sub(pattern, lambda match: match[1] * int(match[2]), drawing)
    return drawing
