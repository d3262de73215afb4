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

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.compact_adam import CompactAdamW
from megatron.crystalcoder.training.config import OptimizerSettings
from megatron.crystalcoder.training.moments import OptimizerStates


def is_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices only."""
    return parameter.dim() > 1


def is_lr_scaled(name: str, parameter: torch.nn.Parameter, *, biases: bool) -> bool:
    """Whether muP scales this parameter's lr: linear layers inside the blocks, their biases too if `biases`."""
    outside = getattr(parameter, "is_embedding_or_output_parameter", False) or "output_layer." in name
    outside = outside or "lora." in name  # an adapter's lr is the one that is asked for
    return not outside and "embedding" not in name and "layernorm" not in name and (parameter.dim() > 1 or biases)


def build_optimizer(
    model: torch.nn.Module, settings: OptimizerSettings, parallel: ParallelConfig, *, bf16: bool, fused: bool = True
) -> MegatronOptimizer:
    """megatron-core's optimizer over `model` (a DistributedDataParallel), lr still to be set by `update`.

    Clipping is `update`'s, which looks at the norm before, so clip_grad is 0 here. fused: the fusion `adamw`.
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
        overlap_param_gather=parallel.overlap_param_gather,
    )
    with _moments_kept_as(settings.states):
        optimizer = get_megatron_optimizer(config, [model], config_overrides=_group_overrides(settings))
    for adam in _adams(optimizer):
        if isinstance(adam, platform.GroupStepAdamW):
            adam.fused = fused
    return optimizer


@contextmanager
def _moments_kept_as(states: OptimizerStates) -> Iterator[None]:
    """Inside, megatron-core's Adam keeps its moments so."""
    import megatron.core.optimizer as mcore_optimizer

    module: Any = mcore_optimizer
    usual = module.Adam
    if states != "fp32":
        if usual is not platform.GroupStepAdamW:
            raise InputError(
                f"--optimizer-states {states} is for this project's own Adam, and {usual.__module__} has taken its "
                "place: uninstall Transformer Engine and Apex, or drop the flag"
            )
        # Triton compiles fp8 for GPUs that have it.
        compiled = torch.cuda.is_available() and (states == "bf16" or torch.cuda.get_device_capability() >= (8, 9))
        module.Adam = partial(CompactAdamW, kind=states, compiled=compiled)
    try:
        yield
    finally:
        module.Adam = usual


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


def decides_on_device(optimizer: MegatronOptimizer) -> bool:
    """Whether `update` clips and leaves out steps without telling the host: what the fusion `adamw` is."""
    return all(isinstance(adam, platform.GroupStepAdamW) and adam.fused for adam in _adams(optimizer))


def update(optimizer: MegatronOptimizer, settings: OptimizerSettings, *, lr: float, loss: Tensor, norm: Tensor) -> None:
    """Update the parameters by the gradients, clipped, unless the loss or the gradients' norm (both fp64 ()) is not
    finite: then `take_back` must follow when the host gets to know.
    """
    set_learning_rate(optimizer, lr)
    place_eps(optimizer, settings)
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    excess = ((norm + 1e-6) / settings.clip_grad).clamp(min=1.0) if settings.clip_grad > 0 else None
    if decides_on_device(optimizer):
        for adam in _adams(optimizer):
            adam.grad_scale = None if excess is None else excess.float()
            adam.found_inf = (~finite).float()
        optimizer.step_with_ready_grads()
    elif bool(finite):
        if excess is not None and bool(excess > 1.0):
            inner: Any = optimizer
            gradients = [parameter.grad for parameter in inner.get_parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, float(1.0 / excess))
        optimizer.step_with_ready_grads()


def take_back(optimizer: MegatronOptimizer) -> None:
    """Forget a step that was not finite, of which `update` has changed nothing but the count."""
    if decides_on_device(optimizer):
        for adam in _adams(optimizer):
            adam.take_back_step()


def _adams(optimizer: MegatronOptimizer) -> list[Any]:
    """The torch optimizers inside; none on a rank whose parameters are all frozen."""
    inner: Any = optimizer
    return [single.optimizer for single in inner.chained_optimizers if single.optimizer is not None]


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
    names = parameter_names(model, optimizer)
    return {
        names[id(parameter)]: (group["lr_mult"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def parameter_names(model: torch.nn.Module, optimizer: MegatronOptimizer) -> dict[int, str]:
    """id of each parameter that the optimizer updates, itself or as a main parameter or shard, -> its name."""
    names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
    inner: Any = optimizer
    for single in inner.chained_optimizers:
        owners = _model_parameter_by_main_parameter(single)
        names |= {main: names[id(owner)] for main, owner in owners.items()}
    return names


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
