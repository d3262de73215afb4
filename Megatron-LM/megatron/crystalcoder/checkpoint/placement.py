"""From tensors in Megatron's files to blocks of logical tensors, by the table of weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Block, Files, Scratch, Span, Stored, read_tensor
from megatron.crystalcoder.checkpoint.tensor_files import Record, TensorRef, contiguous_strides
from megatron.crystalcoder.checkpoint.weights import Row, logical_shapes, megatron_shape
from megatron.crystalcoder.model.config import ModelConfig


@dataclass(frozen=True)
class Region:
    """A rectangle of a row's full tensor in a file; a vector is a column.

    flipped: stored column by column. pitch: values from one stored row (or column) to the next.
    """

    file: Path
    offset: int
    outer: Span
    inner: Span
    pitch: int
    flipped: bool


def matrix_region(ref: TensorRef, corner: tuple[int, int], where: str) -> Region:
    """A stored matrix or vector as the region whose first value lies at `corner` of the full tensor."""
    shape = ref.shape if len(ref.shape) == 2 else (*ref.shape, 1)
    strides = ref.strides if len(ref.strides) == 2 else (*ref.strides, 1)
    outer, inner = (corner[0], corner[0] + shape[0]), (corner[1], corner[1] + shape[1])
    if len(ref.shape) == 1 and strides[0] == 1:
        return Region(ref.file, ref.offset, outer, inner, 1, False)
    if len(ref.shape) == 2 and strides[1] == 1 and strides[0] >= shape[1]:
        return Region(ref.file, ref.offset, outer, inner, strides[0], False)
    if len(ref.shape) == 2 and strides[0] == 1 and strides[1] >= shape[0]:
        return Region(ref.file, ref.offset, outer, inner, strides[1], True)
    raise InputError(f"{ref.file}: tensor {where} is stored with strides {list(ref.strides)}: save it contiguous")


def shard_regions(row: Row, config: ModelConfig, ref: TensorRef, tp_rank: int, tp_size: int) -> list[Region]:
    """Where a tensor-parallel rank's shard lies in the row's full tensor. A gated shard is two: gate and linear."""
    name = row.mcore
    if row.split is None or tp_size == 1:
        return [matrix_region(ref, (0, 0), name)]
    if row.kind != "gated":
        length = ref.shape[row.split]
        return [matrix_region(ref, (tp_rank * length, 0) if row.split == 0 else (0, tp_rank * length), name)]
    length, halves = ref.shape[0] // 2, []
    for half in range(2):
        start = half * length
        piece = TensorRef(
            ref.file,
            ref.offset + start * ref.strides[0] * ref.dtype.itemsize,
            ref.dtype,
            (length, *ref.shape[1:]),
            ref.strides,
        )
        halves.append(matrix_region(piece, (half * config.ffn_hidden_size + tp_rank * length, 0), name))
    return halves


def _segments(row: Row, config: ModelConfig) -> Iterator[tuple[Span, int, int]]:
    """Spans of the full tensor's first dimension: which of `row.hf` each belongs to, and where it begins in that."""
    size = megatron_shape(row, config)[0]
    if row.kind == "gated":
        yield (0, size // 2), 0, 0
        yield (size // 2, size), 1, 0
    elif row.kind == "qkv":
        d, h = config.head_dim, config.hidden_size
        for head in range(config.num_attention_heads):
            for part in range(3):
                start = (head * 3 + part) * d
                yield (start, start + d), 0, part * h + head * d
    else:
        yield (0, size), 0, 0


def logical_blocks(row: Row, config: ModelConfig, region: Region, itemsize: int) -> Iterator[tuple[str, Block, bool]]:
    """The blocks of logical tensors that a region holds: name, block, and whether it is padding that must be zero."""
    shapes = logical_shapes(config)
    for span, part, base in _segments(row, config):
        low, high = max(span[0], region.outer[0]), min(span[1], region.outer[1])
        if low >= high:
            continue
        name = row.hf[part]
        own = shapes[name]
        own_outer, own_inner = (own[0], 1) if len(own) == 1 else own if row.kind == "plain" else (own[1], own[0])
        first, last, inner = base + low - span[0], base + high - span[0], region.inner
        cut, inner_cut = min(last, own_outer), min(inner[1], own_inner)
        real_outer, real_inner = (first, max(first, cut)), (inner[0], max(inner[0], inner_cut))
        rectangles = [(real_outer, real_inner, False)]
        if row.shape != "v h":  # rows of the vocabulary beyond its size are trained like others, and mean nothing
            rectangles += [((real_outer[1], last), inner, True), (real_outer, (real_inner[1], inner[1]), True)]
        for outer_span, inner_span, padding in rectangles:
            if outer_span[0] >= outer_span[1] or inner_span[0] >= inner_span[1]:
                continue
            down, right = outer_span[0] - first + low - region.outer[0], inner_span[0] - region.inner[0]
            values = right * region.pitch + down if region.flipped else down * region.pitch + right
            offset = region.offset + values * itemsize
            if len(own) == 1:
                block = Block(region.file, offset, (0, 1), outer_span, False, outer_span[1] - outer_span[0])
            elif row.kind == "plain":
                block = Block(region.file, offset, outer_span, inner_span, region.flipped, region.pitch)
            else:
                block = Block(region.file, offset, inner_span, outer_span, not region.flipped, region.pitch)
            yield name, block, padding


class BlockWeights:
    """A `WeightSource` whose tensors are known by where they lie.

    records: the zip records of format `torch` that hold them. Opening reads headers only; each read opens its file and
    closes it again.
    """

    def __init__(self, config: ModelConfig, stored: Mapping[str, Stored], records: Iterable[Record] = ()) -> None:
        self.config, self.stored, self.records = config, stored, list(records)

    def names(self) -> Iterable[str]:
        return self.stored

    def dtype(self, name: str) -> torch.dtype:
        return self.stored[name].dtype

    def locate(self, name: str) -> Stored:
        """Where a tensor's values lie, now that they are wanted: what comes from elsewhere is fetched first."""
        return self.stored[name]

    def arrival(self, name: str) -> int:
        """Tensors that come from elsewhere come in this order."""
        return 0

    def abandon(self) -> None:
        """Let go of what is waited for."""

    def read(self, name: str) -> Tensor:
        with Files() as files:
            stored, scratch = self.locate(name), Scratch()
            tensor = read_tensor(files, stored, scratch)
            for copy in stored.copies[1:]:
                other = read_tensor(files, Stored(stored.dtype, stored.shape, [copy]), scratch)
                if not torch.equal(tensor, other):
                    raise InputError(stored.disagreement)
        return tensor


def combined(sets: Mapping[str, BlockWeights]) -> BlockWeights:
    """Several sets of tensors as one: each tensor's name with its set's prefix before it."""
    if set(sets) == {""}:
        return sets[""]
    stored = {prefix + name: entry for prefix, weights in sets.items() for name, entry in weights.stored.items()}
    (config,) = {weights.config for weights in sets.values()}
    return BlockWeights(config, stored, [record for weights in sets.values() for record in weights.records])


class Placement:
    """Collects the blocks of a Megatron checkpoint."""

    def __init__(self, config: ModelConfig, where: Path) -> None:
        self._config, self._where = config, where
        self._copies: dict[str, dict[Hashable, list[Block]]] = {}
        self._stored: dict[str, Stored] = {}
        self._records: dict[tuple[Path, int], Record] = {}

    def add(self, row: Row, ref: TensorRef, regions: Iterable[Region], copy: Hashable, *, is_replica: bool) -> None:
        """Enter a stored tensor. Tensors entered with the same `copy` make up one copy of the row together."""
        if ref.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{ref.file}: tensor {row.mcore} is stored as {ref.dtype}: take weights of floating point")
        if ref.record is not None:
            self._records[ref.record.file, ref.record.offset] = ref.record
        shapes = logical_shapes(self._config)
        for region in regions:
            for name, block, is_padding in logical_blocks(row, self._config, region, ref.dtype.itemsize):
                stored = self._stored.setdefault(name, Stored(ref.dtype, shapes[name]))
                if stored.dtype != ref.dtype:
                    raise InputError(
                        f"{ref.file}: tensor {row.mcore} is stored as {ref.dtype}, elsewhere as {stored.dtype}"
                    )
                if is_padding:
                    stored.padding.append(block)
                    continue
                copies = self._copies.setdefault(name, {})
                if copy not in copies:
                    copies[copy] = []
                    (stored.replicas if is_replica else stored.copies).append(copies[copy])
                copies[copy].append(block)

    def weights(self, disagreement: str) -> BlockWeights:
        """What has been entered. Raises InputError unless every copy of every tensor is whole."""
        in_order: dict[str, Stored] = {}
        for name in logical_shapes(self._config):
            stored = self._stored.get(name)
            if stored is None or not stored.copies:
                raise InputError(f"{self._where}: tensor {name} is missing: the checkpoint is incomplete")
            stored.disagreement = disagreement
            rows, columns = stored.matrix
            for copy in (*stored.copies, *stored.replicas):
                area = sum((b.rows[1] - b.rows[0]) * (b.columns[1] - b.columns[0]) for b in copy)
                if area != rows * columns:
                    raise InputError(f"{self._where}: a part of tensor {name} is missing or there twice: copy it again")
                if len({block.transposed for block in copy}) > 1:
                    raise InputError(f"{self._where}: tensor {name} is stored with mixed strides: save it contiguous")
            in_order[name] = stored
        return BlockWeights(self._config, in_order, self._records.values())


def contiguous_ref(file: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorRef:
    """A row-major tensor at a place of a file."""
    return TensorRef(file, offset, dtype, shape, contiguous_strides(shape))
