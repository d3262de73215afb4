"""The one table of weights: each Hugging Face tensor, its megatron-core tensor, and what lies between them.

Reading, writing, resharding and verifying all go through `Row`s. *Logical* tensors are named and laid out as in the
Hugging Face checkpoint (`Conv1D` weights are [in, out]); a *full* tensor is the megatron-core tensor before it is split
over tensor-parallel ranks; a *shard* is one rank's piece of it.

Shape letters: v vocab, h hidden, f ffn, n heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.layout import Layout
from megatron.crystalcoder.model.config import ModelConfig

DTypes = Mapping[str, torch.dtype]  # by logical tensor
Kind = Literal["plain", "transpose", "qkv", "gated"]


class WeightSource(Protocol):
    """Anything that gives logical tensors one at a time: a checkpoint in any format, or a random initialisation."""

    config: ModelConfig

    def names(self) -> Iterable[str]:
        """Names of all logical tensors, in the table's order."""

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype, without reading the tensor."""

    def read(self, name: str) -> Tensor:
        """One logical tensor, in its stored dtype, in memory that the caller may keep."""


@dataclass(frozen=True)
class Row:
    """One megatron-core tensor.

    hf: the logical tensors it is made of, in the order it holds them; shape: letters of each of them.
    legacy: its name in the reference's Megatron. norm_fused: its name in torch_dist checkpoints and in layers that fuse
    the norm into the linear behind it (Transformer Engine), where that differs.
    kind: plain (equal), transpose (Conv1D [in, out] to Linear [out, in]), qkv (transpose, then all q, all k, all v
    become q, k, v of head 0, of head 1, ...), gated (transpose, then the gate above the linear branch).
    split: the full tensor's dimension that is cut over tensor-parallel ranks, None when every rank holds all of it.
    """

    hf: tuple[str, ...]
    shape: str
    mcore: str
    legacy: str
    kind: Kind
    split: int | None
    norm_fused: str | None = None

    @property
    def sharded_name(self) -> str:
        """The key in a torch_dist checkpoint."""
        return self.norm_fused or self.mcore

    def at_layer(self, global_layer: int, local_layer: int) -> Row:
        """This layer row with the layer numbers put in: the model's own in `hf`, the pipeline stage's elsewhere."""
        return replace(
            self,
            hf=tuple(name.format(i=global_layer) for name in self.hf),
            mcore=self.mcore.format(i=local_layer),
            legacy=self.legacy.format(i=local_layer),
            norm_fused=self.norm_fused and self.norm_fused.format(i=local_layer),
        )


def _layer_row(
    hf: tuple[str, ...], shape: str, mcore: str, legacy: str, kind: Kind, split: int | None, fused: str | None = None
) -> Row:
    return Row(
        tuple(f"transformer.h.{{i}}.{name}" for name in hf),
        shape,
        f"decoder.layers.{{i}}.{mcore}",
        f"language_model.encoder.layers.{{i}}.{legacy}",
        kind,
        split,
        fused and f"decoder.layers.{{i}}.{fused}",
    )


# fmt: off
EMBEDDING = Row(("transformer.wte.weight",), "v h", "embedding.word_embeddings.weight",
                "language_model.embedding.word_embeddings.weight", "plain", 0)
# A tied head is the embedding itself on one pipeline stage, and a copy of it on the last of several.
TIED_HEAD = Row(("transformer.wte.weight",), "v h", "output_layer.weight",
                "word_embeddings_for_head.weight", "plain", 0)
UNTIED_HEAD = Row(("lm_head.weight",), "v h", "output_layer.weight", "language_model.output_layer.weight", "plain", 0)
FINAL_NORM = tuple(
    Row((f"transformer.ln_f.{p}",), "h", f"decoder.final_layernorm.{p}", f"language_model.encoder.final_norm.{p}",
        "plain", None)
    for p in ("weight", "bias")
)
_MLP_IN = ("mlp.c_fc2", "mlp.c_fc")  # c_fc2 is the gate: silu(c_fc2(x)) * c_fc(x)
LAYER = (
    _layer_row(("ln_1.weight",), "h", "input_layernorm.weight", "input_norm.weight", "plain", None,
               "self_attention.linear_qkv.layer_norm_weight"),
    _layer_row(("ln_1.bias",), "h", "input_layernorm.bias", "input_norm.bias", "plain", None,
               "self_attention.linear_qkv.layer_norm_bias"),
    _layer_row(("attn.c_attn.weight",), "h 3h", "self_attention.linear_qkv.weight",
               "self_attention.query_key_value.weight", "qkv", 0),
    _layer_row(("attn.c_attn.bias",), "3h", "self_attention.linear_qkv.bias",
               "self_attention.query_key_value.bias", "qkv", 0),
    _layer_row(("attn.c_proj.weight",), "h h", "self_attention.linear_proj.weight",
               "self_attention.dense.weight", "transpose", 1),
    _layer_row(("attn.c_proj.bias",), "h", "self_attention.linear_proj.bias",
               "self_attention.dense.bias", "plain", None),
    _layer_row(("ln_2.weight",), "h", "pre_mlp_layernorm.weight", "post_attention_norm.weight", "plain", None,
               "mlp.linear_fc1.layer_norm_weight"),
    _layer_row(("ln_2.bias",), "h", "pre_mlp_layernorm.bias", "post_attention_norm.bias", "plain", None,
               "mlp.linear_fc1.layer_norm_bias"),
    _layer_row(tuple(f"{name}.weight" for name in _MLP_IN), "h f", "mlp.linear_fc1.weight",
               "mlp.dense_h_to_4h.weight", "gated", 0),
    _layer_row(tuple(f"{name}.bias" for name in _MLP_IN), "f", "mlp.linear_fc1.bias",
               "mlp.dense_h_to_4h.bias", "gated", 0),
    _layer_row(("mlp.c_proj.weight",), "f h", "mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", "transpose", 1),
    _layer_row(("mlp.c_proj.bias",), "h", "mlp.linear_fc2.bias", "mlp.dense_4h_to_h.bias", "plain", None),
)
# fmt: on


def stage_rows(config: ModelConfig, pp_rank: int = 0, pp_size: int = 1) -> list[Row]:
    """The rows of one stage of an even pipeline: `num_layers / pp_size` consecutive layers, numbered from 0."""
    return chunk_rows(config, Layout(1, pp_size, (config.num_layers // pp_size,) * pp_size), pp_rank)


def chunk_rows(config: ModelConfig, layout: Layout, chunk: int) -> list[Row]:
    """The rows of one chunk of a pipeline's layers, numbered from 0 in every chunk."""
    rows = [EMBEDDING] if chunk == 0 else []
    for local, layer in enumerate(layout.layers(chunk)):
        rows += [row.at_layer(layer, local) for row in LAYER]
    if chunk == layout.num_chunks - 1:
        rows += FINAL_NORM
        if not config.tie_word_embeddings:
            rows.append(UNTIED_HEAD)
        elif layout.pipeline_parallel > 1:
            rows.append(TIED_HEAD)
    return rows


@lru_cache(maxsize=8)
def logical_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every logical tensor, unpadded; the copy of the embedding under a tied head is not one."""
    own = config.unpadded
    return MappingProxyType({name: _logical_shape(row, own) for row in stage_rows(config) for name in row.hf})


def _logical_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    h = config.hidden_size
    letters = {"v": config.vocab_size, "h": h, "3h": 3 * h, "f": config.ffn_hidden_size}
    return tuple(letters[letter] for letter in row.shape.split())


def megatron_shape(row: Row, config: ModelConfig, tp_size: int = 1) -> tuple[int, ...]:
    """Shape of a row's shard at this tensor-parallel size; of its full tensor at size 1."""
    shape = list(_logical_shape(row, config))
    if row.kind != "plain":
        shape.reverse()
    if row.kind == "gated":
        shape[0] *= 2
    if row.split is not None:
        shape[row.split] //= tp_size
    return tuple(shape)


def megatron_dtype(row: Row, dtypes: DTypes) -> torch.dtype:
    """Dtype of a row's tensor. Raises InputError when its parts are stored in different ones."""
    first, *others = (dtypes[name] for name in row.hf)
    if any(other != first for other in others):
        raise InputError(
            f"{' and '.join(row.hf)} have different dtypes, but become one tensor: choose one with --dtype"
        )
    return first


def to_full(row: Row, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Logical tensors to the full megatron-core tensor, padded with zeros where the model is. `t()` leaves biases."""
    parts = [_pad(part, _logical_shape(row, config)) for part in parts]
    if row.kind == "plain":
        return parts[0]
    if row.kind == "gated":
        return torch.cat([part.t() for part in parts])
    full = parts[0].t()
    if row.kind == "qkv":
        return _swap_outer(full, 3, config.num_attention_heads)
    return full.contiguous()


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _swap_outer(full: Tensor, outer: int, inner: int) -> Tensor:
    """[outer * inner * d, ...] to [inner * outer * d, ...]."""
    return full.unflatten(0, (outer, inner, -1)).transpose(0, 1).reshape(full.shape)


def shard(row: Row, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """One tensor-parallel rank's piece of a full tensor, in memory of its own.

    A gated tensor's two halves are cut each: rank t holds [gate_t; linear_t].
    """
    if row.split is None or tp_size == 1:
        return full
    if row.kind == "gated":
        piece = full.unflatten(0, (2, -1)).chunk(tp_size, 1)[tp_rank].flatten(0, 1)
    else:
        piece = full.chunk(tp_size, row.split)[tp_rank]
    return piece.clone(memory_format=torch.contiguous_format)


def rank_tensor(source: WeightSource, row: Row, config: ModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """Read what one row needs and cut this rank's shard from it."""
    full = to_full(row, [source.read(name) for name in row.hf], config)
    return shard(row, full, tp_rank, tp_size)


def rank_tensors(
    source: WeightSource, config: ModelConfig, *, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int
) -> Iterator[tuple[Row, Tensor]]:
    """Every tensor of one rank, one at a time."""
    config.check_layout(tp_size, pp_size)
    for row in stage_rows(config, pp_rank, pp_size):
        yield row, rank_tensor(source, row, config, tp_rank, tp_size)


def rank_state_dict(
    source: WeightSource, config: ModelConfig, *, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int
) -> dict[str, Tensor]:
    """What this rank's `GPTModel.load_state_dict(strict=True)` takes."""
    layout = {"tp_rank": tp_rank, "tp_size": tp_size, "pp_rank": pp_rank, "pp_size": pp_size}
    return {row.mcore: tensor for row, tensor in rank_tensors(source, config, **layout)}
