"""The coordinate check of muP: does the size of activations, and of their changes, stay put as the model gets wider?

A few steps are trained at each width. Before the first and after each, one batch that is never trained on goes through
the model, and the mean absolute value of what every module puts out is noted; and that of its difference from what it
put out before the first step. Under muP neither depends on the width, which is what lets learning rates transfer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.crystalcoder.data.order import Order
from megatron.crystalcoder.data.rows import Rows
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.params import Params
from megatron.crystalcoder.training.step import forward_backward, num_micro_batches, train_step
from megatron.crystalcoder.training.widths import Parametrisation, Trial, begin


@dataclass(frozen=True)
class Sizes:
    """Mean absolute value of a module's output, and of its change since step 0, after each step (0 first)."""

    activation: list[float]
    update: list[float]


def measure(
    params: Params,
    config: TrainConfig,
    parametrisation: Parametrisation,
    width: int,
    data: tuple[Rows, Order],
    *,
    steps: int,
    lr: float,
    seed: int,
) -> dict[str, Sizes]:
    """Train `steps` steps at `width`; the sizes by module, the same on every rank."""
    config = replace(config, speed=Speed(fusions=frozenset()))  # fused parts put nothing out between their modules
    trial = begin(params, config, width, parametrisation, data, seed=seed)
    probe = list(islice(trial.batches, num_micro_batches(trial.config)))
    first = _outputs(trial, probe)
    sizes = {name: Sizes([_size(x)], [0.0]) for name, x in first.items()}
    for _ in range(steps):
        train_step(trial.model, trial.optimizer, trial.batches, trial.config, lr=lr)
        for name, x in _outputs(trial, probe).items():
            sizes[name].activation.append(_size(x))
            sizes[name].update.append(_size(x - first[name]))
    return _over_ranks(sizes)


def slopes(sizes: Mapping[int, Sequence[float]]) -> list[float]:
    """Of log size over log width, by least squares, for each step; `sizes` by width. 0 where nothing changed yet."""
    logs = [math.log(width) for width in sizes]
    mean = sum(logs) / len(logs)
    result = []
    for values in zip(*sizes.values(), strict=True):
        if min(values) <= 0:
            result.append(0.0)
            continue
        rise = sum((x - mean) * math.log(value) for x, value in zip(logs, values, strict=True))
        result.append(rise / sum((x - mean) ** 2 for x in logs))
    return result


def _outputs(trial: Trial, probe: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What each module of this stage puts out for the probe batch, its micro-batches one after the other."""
    trial.model.eval()
    with torch.no_grad(), _recorded(trial.model) as outputs:
        forward_backward(trial.model, probe, [1.0] * len(probe), trial.config, forward_only=True)
    trial.model.train()
    return {name: torch.cat([x.flatten() for x in parts]) for name, parts in outputs.items()}


@contextmanager
def _recorded(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Note what the stage's modules put out while inside; a bias that a layer leaves to be added counts as added."""
    stage = model.module
    modules = {"embedding": getattr(stage, "embedding", None), "logits": getattr(stage, "output_layer", None)}
    for layer in stage.decoder.layers:
        modules[f"layer {layer.layer_number} attention"] = layer.self_attention
        modules[f"layer {layer.layer_number} MLP"] = layer.mlp
        modules[f"layer {layer.layer_number}"] = layer
    if stage.post_process:
        modules["token loss"] = stage
    else:
        modules["logits"] = None
    outputs: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            values, *rest = output if isinstance(output, tuple) else (output,)
            bias = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].dim() == 1 else None
            # A copy: the cross entropy turns the logits into probabilities in place.
            outputs.setdefault(name, []).append((values if bias is None else values + bias).float().clone())

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items() if module is not None]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _size(x: Tensor) -> float:
    return float(x.abs().mean())


def _over_ranks(sizes: dict[str, Sizes]) -> dict[str, Sizes]:
    """Every stage's modules on every rank, averaged over the tensor-parallel ranks' equal shares."""
    gathered: list[dict[str, Sizes]] = [sizes] * dist.get_world_size()
    dist.all_gather_object(gathered, sizes)
    merged: dict[str, Sizes] = {}
    for name in dict.fromkeys(name for part in gathered for name in part):
        parts = [part[name] for part in gathered if name in part]
        merged[name] = Sizes(
            *(
                [sum(values) / len(parts) for values in zip(*(getattr(part, kind) for part in parts), strict=True)]
                for kind in ("activation", "update")
            )
        )
    return merged
