"""LoRA on megatron-core's linear layers: small trained matrices beside frozen weights (Hu et al. 2021).

    y = W x + alpha / r * B A x

A layer whose output is split over tensor-parallel ranks has B split with it; one whose input is split has A split. What
passes between A and B is r wide, so the communication that tensor and sequence parallelism need there is small. Each
Hugging Face layer has its own pair, so gate and linear branch have two, though megatron-core keeps them as one matrix.

Shape letters: s sequence, b micro-batch, r rank, i input, o output.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint.adapter import ADAPTER, Adapter, read_adapter, write_adapter
from megatron.crystalcoder.checkpoint.weights import LAYER, Row, shard
from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.model.lora import LoraSettings, target_shape
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.resume import Start

# target -> the megatron-core linear of a layer that holds it
_LINEARS = {
    "attn.c_attn": "self_attention.linear_qkv",
    "attn.c_proj": "self_attention.linear_proj",
    "mlp.c_fc2": "mlp.linear_fc1",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}
_SPLIT_INPUT = ("attn.c_proj", "mlp.c_proj")


class LoraPair(torch.nn.Module):
    """A and B of one layer on this rank. `forward(x)` is what is added to the layer's output."""

    def __init__(self, name: str, target: str, a: Tensor, b: Tensor, scale: float, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.name, self.splits_input, self.scale = name, target in _SPLIT_INPUT, scale
        self.sequence_parallel = sequence_parallel
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)
        split, whole, dim = (self.a, self.b, 1) if self.splits_input else (self.b, self.a, 0)
        set_tensor_model_parallel_attributes(split, True, dim, 1)
        set_tensor_model_parallel_attributes(whole, False, -1, 1)
        # With sequence parallelism each rank sees its part of the tokens: their gradients are summed at the end.
        setattr(whole, "sequence_parallel", sequence_parallel)  # noqa: B010 - not a declared attribute

    def forward(self, x_sbi: Tensor) -> Tensor:
        """(s, b, i) -> (s, b, o), of the shapes that the layer takes and gives on this rank."""
        u_sbr = torch.nn.functional.linear(x_sbi, self.a)
        if self.splits_input:
            if self.sequence_parallel:
                u_sbr = reduce_scatter_to_sequence_parallel_region(u_sbr)
            else:
                u_sbr = reduce_from_tensor_model_parallel_region(u_sbr)
        elif self.sequence_parallel:
            u_sbr = gather_from_sequence_parallel_region(u_sbr)
        else:
            u_sbr = copy_to_tensor_model_parallel_region(u_sbr)
        return torch.nn.functional.linear(u_sbr, self.b) * self.scale


class LoraAdapters(torch.nn.Module):
    """All pairs of this pipeline stage, and where the weights come from that they adapt."""

    def __init__(self, settings: LoraSettings, base: Path, config: ModelConfig) -> None:
        super().__init__()
        self.settings, self.base, self._config = settings, base, config
        self.pairs = torch.nn.ModuleList()

    def _each(self) -> Iterator[LoraPair]:
        return iter(self.pairs)  # type: ignore[arg-type]

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, ShardedTensor]:
        """The pairs under names that hold the model's own layer numbers, for megatron-core's distributed checkpoint."""
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        dp_rank = parallel_state.get_data_parallel_rank()
        sharded = {}
        for pair in self._each():
            for letter, dim in (("a", 1), ("b", 0)):
                parameter = getattr(pair, letter)
                is_split = parameter.tensor_model_parallel
                key = f"{prefix}{pair.name}.{letter}"
                sharded[key] = ShardedTensor.from_rank_offsets(
                    key,
                    parameter,
                    *([(dim, tp_rank, tp_size)] if is_split else []),
                    replica_id=(0, 0 if is_split else tp_rank, dp_rank),
                )
        return sharded

    def whole(self) -> Adapter | None:
        """The adapter of the whole model, on global rank 0; None elsewhere. Every rank calls it."""
        mine = {}
        if parallel_state.get_data_parallel_rank() == 0:
            mine = {pair.name: (pair.a.detach().float().cpu(), pair.b.detach().float().cpu()) for pair in self._each()}
        place = (parallel_state.get_tensor_model_parallel_rank(), mine)
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(place, gathered, dst=0)
        if gathered is None:
            return None
        shards: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for tp_rank, pairs in gathered:
            for name, pair in pairs.items():
                shards.setdefault(name, {})[tp_rank] = pair
        matrices = {}
        for layer in range(self._config.num_layers):
            for target in self.settings.targets:
                name = f"transformer.h.{layer}.{target}"
                pieces = [shards[name][rank] for rank in sorted(shards[name])]
                a_row, b_row = _rows(target)
                a, b = (
                    parts[0] if row.split is None else torch.cat(parts, row.split)
                    for row, parts in zip((a_row, b_row), map(list, zip(*pieces, strict=True)), strict=True)
                )
                matrices[name] = (a, _to_hf(b_row, b, self._config))
        return Adapter(self.settings, matrices)


def add_lora(stage: Any, config: TrainConfig, start: Start) -> None:
    """Freeze this pipeline stage, whose weights are loaded, and put adapters on it: those of the run that goes on, or
    new ones, whose product is 0. Needs megatron-core's parallel state."""
    assert config.lora is not None
    if start.checkpoint is not None and start.checkpoint.adapter is not None:
        base = Path(vars(start.checkpoint.args)["lora"]["base"])
        _add(stage, config.lora, config.model, base, read_adapter(start.checkpoint.adapter, config.model))
    elif config.load is not None:
        _add(stage, config.lora, config.model, config.load.resolve(), None)
    else:
        raise InputError("--lora-rank trains an adapter of a checkpoint: give one with --load")


def record_adapter(args: argparse.Namespace, adapters: LoraAdapters) -> None:
    """Say in a checkpoint's args what its adapter is and whose."""
    settings = adapters.settings
    facts = {"rank": settings.rank, "alpha": settings.alpha, "targets": list(settings.targets)}
    vars(args)["lora"] = {**facts, "base": str(adapters.base)}


def save_adapter(folder: Path, adapters: LoraAdapters) -> None:
    """Write the adapter of the whole model. Every rank calls it."""
    whole = adapters.whole()
    if whole is not None:
        write_adapter(folder / ADAPTER, whole, adapters.base)


def trained_state(stage: Any) -> dict[str, Any]:
    """What a checkpoint holds of a pipeline stage, as megatron-core takes it: all of it, or its adapters alone."""
    return stage.lora.sharded_state_dict("lora.") if hasattr(stage, "lora") else stage.sharded_state_dict()


def _add(stage: Any, settings: LoraSettings, config: ModelConfig, base: Path, start: Adapter | None) -> None:
    for parameter in stage.parameters():
        parameter.requires_grad_(False)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    sequence_parallel = bool(stage.config.sequence_parallel)
    adapters = LoraAdapters(settings, base, config)
    for layer in stage.decoder.layers:
        of_linear: dict[str, dict[str, LoraPair]] = {}
        for target in settings.targets:
            name = f"transformer.h.{layer.layer_number - 1}.{target}"
            a, b = start.matrices[name] if start else _new_pair(name, target, settings, config)
            a_row, b_row = _rows(target)
            place = {"device": platform.device(), "dtype": stage.config.params_dtype}
            pair = LoraPair(
                name,
                target,
                shard(a_row, a, tp_rank, tp_size).to(**place),
                shard(b_row, _from_hf(b_row, b, config), tp_rank, tp_size).to(**place),
                settings.scale,
                sequence_parallel=sequence_parallel,
            )
            adapters.pairs.append(pair)
            of_linear.setdefault(_LINEARS[target], {})[target] = pair
        for path, pairs in of_linear.items():
            layer.get_submodule(path).register_forward_hook(_addition(pairs))
    stage.lora = adapters
    if stage.pre_process:
        # Recomputed layers give gradients only where their input asks for one.
        stage.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _addition(pairs: dict[str, LoraPair]) -> Any:
    """A forward hook for a linear layer: adds what its pairs give."""
    halves = [pairs.get(target) for target in ("mlp.c_fc2", "mlp.c_fc")]  # the gate stands first
    alone = next(iter(pairs.values()))

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        y, bias = output
        if not any(halves):
            return y + alone(inputs[0]), bias
        parts = [
            part if pair is None else part + pair(inputs[0])
            for pair, part in zip(halves, y.chunk(2, dim=-1), strict=True)
        ]
        return torch.cat(parts, dim=-1), bias

    return add


def _new_pair(name: str, target: str, settings: LoraSettings, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """A drawn as PEFT draws it, B zero: a function of the name and sizes alone, so that no layout changes it."""
    fan_in, fan_out = target_shape(config, target)
    seed = int.from_bytes(hashlib.sha256(f"lora/{name}".encode()).digest()[:8]) >> 1
    bound = 1 / math.sqrt(fan_in)  # kaiming_uniform with a = sqrt(5)
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(settings.rank, fan_in).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(fan_out, settings.rank)


def _rows(target: str) -> tuple[Row, Row]:
    """How A and B are laid out and split, in the terms of the table of weights."""
    weight = next(row for row in LAYER if any(hf.endswith(f".{target}.weight") for hf in row.hf))
    hf = (f"{target}.weight",)
    splits_input = target in _SPLIT_INPUT
    a = Row(hf, "", "", "", "plain", 1 if splits_input else None)
    b = Row(hf, "", "", "", "qkv" if weight.kind == "qkv" else "plain", None if splits_input else 0)
    return a, b


def _from_hf(row: Row, b: Tensor, config: ModelConfig) -> Tensor:
    """B's rows in megatron-core's order, that of the outputs they make: q, k, v of head 0, of head 1, ..."""
    return _swap_outer(b, 3, config.num_attention_heads) if row.kind == "qkv" else b


def _to_hf(row: Row, b: Tensor, config: ModelConfig) -> Tensor:
    """The inverse: all q, all k, all v."""
    return _swap_outer(b, config.num_attention_heads, 3) if row.kind == "qkv" else b


def _swap_outer(b: Tensor, outer: int, inner: int) -> Tensor:
    return b.unflatten(0, (outer, inner, -1)).transpose(0, 1).reshape(b.shape)
