"""Put weights into a live model."""

from __future__ import annotations

from typing import Any

import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.verify import check_finite
from megatron.crystalcoder.checkpoint.weights import WeightSource, logical_shapes, rank_tensors
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig


@torch.no_grad()
def load_weights(model: torch.nn.Module, source: WeightSource, config: ModelConfig, parallel: ParallelConfig) -> None:
    """Fill this rank's pipeline stage from a source of any layout; values are cast to the parameters' dtype.

    Needs megatron-core's parallel state. `model` may be wrapped (DDP, Float16Module). Memory beyond the model: one full
    tensor. Raises InputError when the source is of another size or holds NaN.
    """
    from megatron.core import parallel_state

    expected, found = logical_shapes(config), logical_shapes(source.config)
    for name in dict(expected) | dict(found):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"tensor {name}: the model has shape {expected.get(name)}, the checkpoint {found.get(name)}: "
                "the sizes given do not belong to this checkpoint"
            )
    while hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    parameters: dict[str, Any] = dict(model.named_parameters())
    for row, tensor in rank_tensors(
        source,
        config,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_model_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pipeline_model_parallel_size,
    ):
        name = row.mcore if row.mcore in parameters else row.sharded_name
        parameters.pop(name).copy_(check_finite(tensor, name, "the weights to load"))
    if parameters:
        raise RuntimeError(f"the model has parameters that the table of weights lacks: {', '.join(parameters)}")
