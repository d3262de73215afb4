"""Write megatron-core's `torch_dist` format without a model, a process group or more than one tensor in memory.

`megatron.core.dist_checkpointing.load` reads it with any model's `sharded_state_dict()`, at any TP and PP.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron.crystalcoder.checkpoint.megatron_args import CHECKPOINT_VERSION
from megatron.crystalcoder.checkpoint.torch_dist_reader import COMMON, FORMAT, stacked
from megatron.crystalcoder.checkpoint.weights import (
    Row,
    WeightSource,
    megatron_dtype,
    megatron_shape,
    stage_rows,
    to_full,
)
from megatron.crystalcoder.model.config import ModelConfig

# megatron-core's linear layers ask for their (empty) extra state when they load.
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def write_torch_dist(
    iteration_dir: Path, source: WeightSource, config: ModelConfig, args: argparse.Namespace, iteration: int
) -> None:
    """Fill `iteration_dir` with .metadata, *.distcp, common.pt and metadata.json."""
    iteration_dir.mkdir(parents=True)
    writer = dcp.FileSystemWriter(iteration_dir, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's note that there is no process group: that is the point
        try:
            dcp.save({}, storage_writer=writer, planner=_TablePlanner(source, config), no_dist=True)
        except CheckpointException as error:
            raise error.failures[0][0] from error  # what the source raised, such as a NaN's InputError
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    torch.save(common, iteration_dir / COMMON)
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (iteration_dir / FORMAT).write_text(json.dumps(formats))


class _TablePlanner(DefaultSavePlanner):
    """Plans one chunk per row of the table, and reads a row's tensors only when torch is about to write its chunk."""

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        super().__init__(flatten_state_dict=False)
        self._source, self._config = source, config
        self._rows: dict[MetadataIndex, Row] = {}

    def create_local_plan(self) -> SavePlan:
        items = [*self._tensor_items(), *self._extra_state_items()]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        row = self._rows[write_item.index]
        full = to_full(row, [self._source.read(name) for name in row.hf], self._config)
        assert write_item.tensor_data is not None
        return full.view(write_item.tensor_data.chunk.sizes)

    def _tensor_items(self) -> Iterator[WriteItem]:
        for row in stage_rows(self._config):
            key, layer = stacked(row.sharded_name)
            size = sizes = torch.Size(megatron_shape(row, self._config))
            offsets = torch.Size([0] * len(size))
            if layer is not None:
                size = torch.Size([self._config.num_layers, *size])
                sizes, offsets = torch.Size([1, *sizes]), torch.Size([layer, *offsets])
            index = MetadataIndex(key, offsets)
            self._rows[index] = row
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=megatron_dtype(row, self._source)), size
            )
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def _extra_state_items(self) -> Iterator[WriteItem]:
        layers = self._config.num_layers
        for linear in _LINEARS:
            for layer in range(layers):
                key = f"decoder.layers.{linear}._extra_state/shard_{layer}_{layers}"
                yield WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)

    def lookup_object(self, index: MetadataIndex) -> Any:
        raise NotImplementedError("tensors are resolved from the source, not looked up in a state dict")
