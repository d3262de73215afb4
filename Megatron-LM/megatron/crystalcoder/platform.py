"""The one file that knows whether this is CUDA + NCCL or CPU + gloo.

megatron-core asks CUDA for the current device, for random states and for tensors with `device="cuda"`. On a machine
without CUDA, `initialize` has every such question answered with the CPU, so that tensor, pipeline, sequence and data
parallelism, the distributed optimizer and distributed checkpoints run on any laptop, as they are. With CUDA it changes
nothing. On both it hands megatron-core an Adam that keeps its step where the distributed optimizer looks for it, unless
Transformer Engine or Apex bring theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron.crystalcoder.model.config import ParallelConfig

# Dense bf16 peak by GPU name, FLOP/s: the denominator of MFU. The first name that is part of the GPU's counts.
_PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}

# The environment variable in which a launcher that restarts jobs (training/elastic.py) tells ranks which attempt it is.
ATTEMPT = "CRYSTALCODER_ATTEMPT"


def is_cuda() -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_cuda() else torch.device("cpu")


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on this rank's device. On a GPU by way of pinned memory, so that the host does not wait."""
    if not is_cuda():
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device(), non_blocking=True)


def peak_flops() -> float | None:
    """Dense bf16 peak of this rank's GPU in FLOP/s, or None where it is not known (a CPU, another GPU)."""
    if not is_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for gpu, flops in _PEAK_BF16_FLOPS.items() if gpu in name), None)


def peak_memory_bytes() -> int:
    """Highest memory taken so far: the GPU's allocations, or this process's resident set."""
    if is_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def initialize(init_method: str | None = None) -> None:
    """Join the process group (nccl or gloo) that torchrun's environment describes; a lone process is a group of one.

    Safe to call again. `init_method` overrides the rendezvous, as in `torch.distributed.init_process_group`.
    """
    if is_cuda():
        torch.cuda.set_device(device())
    else:
        _answer_cuda_questions_with_cpu()
    _provide_adam()
    if dist.is_initialized():
        return
    backend = "nccl" if is_cuda() else "gloo"
    timeout = timedelta(minutes=30)
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store_of_this_attempt(timeout) if init_method is None else None
    dist.init_process_group(
        backend,
        init_method=None if store is not None else init_method or "env://",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device() if is_cuda() else None,
    )


def _store_of_this_attempt(timeout: timedelta) -> dist.Store | None:
    """Where this job's ranks meet, apart from those of earlier attempts; None where no launcher counts attempts."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or ATTEMPT not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt {os.environ[ATTEMPT]}", shared)


def initialize_model_parallel(parallel: ParallelConfig, seed: int = 1234) -> None:
    """(Re)build megatron-core's parallel groups for this layout and seed its random-number trackers."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _destroy_model_parallel_groups()
    parallel_state.initialize_model_parallel(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        _destroy_model_parallel_groups()
        dist.destroy_process_group()


def _destroy_model_parallel_groups() -> None:
    """Forget the layout and end its groups: megatron-core only drops them, and each gloo group keeps its threads."""
    from megatron.core import parallel_state

    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


class _CudaMeansCpu(TorchFunctionMode):
    """Redirect `device="cuda"` and `.cuda()` to the CPU, and give CPU tensors the type names megatron-core expects."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if target is not None and str(target).startswith("cuda"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


_cuda_means_cpu = _CudaMeansCpu()
_answered = False


def _answer_cuda_questions_with_cpu() -> None:
    """Patch what megatron-core asks of `torch.cuda`, once a process. Every patch stands in this function."""
    global _answered
    if _answered:
        return
    _answered = True
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *args: None
    cuda.current_stream = lambda *args: None
    cuda.is_initialized = lambda: False
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    for name in (
        "FloatTensor",
        "HalfTensor",
        "BFloat16Tensor",
        "IntTensor",
        "LongTensor",
        "DoubleTensor",
        "ByteTensor",
    ):
        setattr(cuda, name, getattr(torch, name))
    _cuda_means_cpu.__enter__()

    import megatron.core.tensor_parallel.random as mcore_random

    random_module: Any = mcore_random
    random_module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random_module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (decoupled decay, bias correction) in the shape of FusedAdam, with torch's fused kernel underneath.

    torch's own AdamW keeps `step` per parameter; megatron-core's distributed optimizer saves and loads it from the
    param group, as FusedAdam has it. State per parameter: exp_avg, exp_avg_sq, of the parameter's shape and dtype.

    Two attributes, tensors () on the device, as torch's fused optimizers have them under gradient scaling: gradients
    are divided by `grad_scale`, and with `found_inf` at 1 parameters and moments stay as they are. The host need not
    know either; `group["step"]` counts a step left out too, until `take_back_step`. `fused` off writes the update out
    operation by operation, and knows neither.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        if not (bias_correction and adam_w_mode):
            raise ValueError("GroupStepAdamW always corrects the bias and decouples the decay")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )
        self.fused = True
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            # Counted for empty groups too: every rank of a distributed optimizer must agree on the step.
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters)

    def update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        """One update of these parameters of a group, of which each has a gradient."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        (self._fused_update if self.fused else self._plain_update)(group, parameters)

    def take_back_step(self) -> None:
        """Uncount a step that `found_inf` left out."""
        for group in self.param_groups:
            group["step"] -= 1

    def _fused_update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        step = torch.full((), float(group["step"]), device=parameters[0].device)
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )

    def _plain_update(self, group: dict[str, Any], parameters: list[Any]) -> None:
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        for parameter in parameters:
            mean, square = self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]
            mean.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            parameter.mul_(1 - lr * group["weight_decay"]).addcdiv_(mean, root, value=-lr / (1 - beta1**step))


def _provide_adam() -> None:
    """Give megatron-core `GroupStepAdamW` where neither Transformer Engine nor Apex is installed."""
    import megatron.core.optimizer as mcore_optimizer
    import megatron.core.optimizer.distrib_optimizer as mcore_distributed_optimizer

    optimizer_module: Any = mcore_optimizer
    distributed_module: Any = mcore_distributed_optimizer
    if not optimizer_module.USING_PYTORCH_OPTIMIZER:
        return
    optimizer_module.Adam = GroupStepAdamW
    optimizer_module.USING_PYTORCH_OPTIMIZER = False
    distributed_module.Adam = GroupStepAdamW
    distributed_module.HAVE_APEX_OR_TE = True


def adam_class() -> type[torch.optim.Optimizer]:
    """The Adam that megatron-core will use: Transformer Engine's, Apex's or `GroupStepAdamW`."""
    import megatron.core.optimizer as mcore_optimizer

    return mcore_optimizer.Adam
