"""AdamW over megatron-core's buffers, in the parameter groups that muP asks for.

|                          | weight decay | lr                                              |
|--------------------------|--------------|-------------------------------------------------|
| embedding (= tied head)  | yes          | lr                                              |
| hidden linear weights    | yes          | lr * hidden_lr_scale                            |
| hidden linear biases     | no           | lr * hidden_lr_scale if scale_hidden_biases     |
| LayerNorm weight, bias   | no           | lr                                              |

With pipeline parallelism the last stage holds a copy of the embedding named `output_layer.weight`: it belongs to the
embedding's group, else the two copies drift apart.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import OptimizerSettings


def is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices only."""
    return parameter.dim() > 1


def is_lr_scaled(name: str, parameter: torch.nn.Parameter, *, biases: bool) -> bool:
    """Whether muP scales this parameter's lr: linear layers inside the blocks, their biases too if `biases`."""
    outside = getattr(parameter, "is_embedding_or_output_parameter", False) or "output_layer." in name
    outside = outside or "lora." in name  # an adapter's lr is the one that is asked for
    return not outside and "embedding" not in name and "layernorm" not in name and (parameter.dim() > 1 or biases)


def build_optimizer(
    model: torch.nn.Module, settings: OptimizerSettings, parallel: ParallelConfig, *, bf16: bool
) -> MegatronOptimizer:
    """megatron-core's optimizer over `model` (a DistributedDataParallel), lr still to be set by `set_learning_rate`.

    Clipping is left to the caller (`train_step` looks at the norm in between), so clip_grad is 0 here.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, [model], config_overrides=_group_overrides(settings))


def _group_overrides(settings: OptimizerSettings) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core 0.16 groups parameters by equal overrides. lr_mult does nothing in megatron-core itself; it is what
    `set_learning_rate` reads, and part of the key by which a loaded checkpoint's groups find ours."""
    undecayed: Any = {"wd_mult": 0.0, "weight_decay": 0.0}
    scaled: Any = {"lr_mult": settings.hidden_lr_scale}
    overrides = {_parameters("undecayed", lambda parameter, name: not is_decayed(name, parameter)): undecayed}
    if settings.hidden_lr_scale != 1.0:
        biases = settings.scale_hidden_biases
        overrides[_parameters("lr_scaled", lambda parameter, name: is_lr_scaled(name, parameter, biases=biases))] = (
            scaled
        )
    return overrides


def _parameters(name: str, predicate: Any) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=predicate))


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set every group's lr for the next step: lr times the group's muP factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def place_eps(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> None:
    """Set eps for the next step, as `settings.eps_before_correction` wants it.

    m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t) is Adam's own formula with eps / sqrt(1 - b2^t) in eps's place.
    """
    if settings.eps_before_correction:
        for group in optimizer.param_groups:
            group["eps"] = settings.adam_eps / (1.0 - settings.adam_beta2 ** (group.get("step", 0) + 1)) ** 0.5


def restore_settings(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> None:
    """Put the configured AdamW settings back after loading a state, which brings those of the run that saved it."""
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        group["betas"] = (settings.adam_beta1, settings.adam_beta2)
        group["eps"] = settings.adam_eps


def parameter_settings(model: torch.nn.Module, optimizer: MegatronOptimizer) -> dict[str, tuple[float, float]]:
    """Local parameter name -> (lr factor, weight decay), as the live optimizer's groups on this rank have them.

    Without the distributed optimizer every local parameter is listed; with it, those of which this rank holds a shard.
    """
    names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
    inner: Any = optimizer
    found: dict[str, tuple[float, float]] = {}
    for single in inner.chained_optimizers:
        owners = _model_parameter_by_main_parameter(single)
        for group in single.param_groups:
            for parameter in group["params"]:
                owner = owners.get(id(parameter), parameter)
                found[names[id(owner)]] = (group["lr_mult"], group["weight_decay"])
    return found


def _model_parameter_by_main_parameter(optimizer: Any) -> dict[int, torch.nn.Parameter]:
    """Which model parameter each fp32 main parameter (bf16, distributed optimizer) stands for."""
    pairs: list[tuple[str, str]] = [
        ("float16_groups", "fp32_from_float16_groups"),
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
        ("model_fp32_groups", "shard_fp32_groups"),
    ]
    owners: dict[int, torch.nn.Parameter] = {}
    for models, mains in pairs:
        for model_group, main_group in zip(getattr(optimizer, models, []), getattr(optimizer, mains, []), strict=True):
            owners.update({id(main): owner for owner, main in zip(model_group, main_group, strict=True)})
    return owners
