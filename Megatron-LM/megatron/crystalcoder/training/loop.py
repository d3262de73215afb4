"""The training loop that both front doors call: set up, find where to start, step, save."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint.load import load_weights
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.data.prefetch import prefetched
from megatron.crystalcoder.model.gpt import build_model
from megatron.crystalcoder.model.kernels.fp8 import MULTIPLE
from megatron.crystalcoder.training.accounting import Accounting, open_account
from megatron.crystalcoder.training.best_checkpoint import BestCheckpoint
from megatron.crystalcoder.training.config import SettingError, TrainConfig
from megatron.crystalcoder.training.evaluation import evaluate, open_evaluation_sets
from megatron.crystalcoder.training.lora import add_lora
from megatron.crystalcoder.training.metrics import MetricsLog
from megatron.crystalcoder.training.optimizer import build_optimizer
from megatron.crystalcoder.training.profiling import StepProfiler
from megatron.crystalcoder.training.resume import Progress, Start, find_start
from megatron.crystalcoder.training.run_state import load_run, save_run
from megatron.crystalcoder.training.schedules import learning_rate
from megatron.crystalcoder.training.step import num_micro_batches, start_step
from megatron.crystalcoder.training.step_reader import StepReader, reads_late


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended. lm_loss is None when there was no step left to do."""

    iteration: int
    consumed_samples: int
    lm_loss: float | None
    interrupted: bool = False


def train(
    config: TrainConfig,
    *,
    initial_weights: WeightSource | None = None,
    on_checkpoint: Callable[[Progress, Accounting], None] | None = None,
) -> TrainResult:
    """Train until `config.train_iters`, or until a SIGTERM has been answered with a checkpoint.

    Needs `platform.initialize()` before. `initial_weights` are what a run begins with when neither `config.save` nor
    `config.load` holds a checkpoint. `on_checkpoint` is called on every rank: before the first step with what the run
    starts from, and after each checkpoint. Raises InputError before the first step when anything the user gave does not
    fit, NonFiniteError when the run diverges (unless `config.skip_nonfinite`).
    """
    check_sizes(config)
    platform.initialize_model_parallel(config.parallel, config.seed)
    rows, order = open_data(config.data, seq_length=config.seq_length, vocab_size=config.model.vocab_size)
    evaluation_sets = open_evaluation_sets(config) if config.eval_interval else []
    start = find_start(config, initial_weights)
    account = open_account(config, rows, order, start)
    this_rank = _rank_of_order(config)
    progress = start.progress
    order.rows(progress.consumed_samples, **this_rank)  # an order that cannot go on from here says so now

    profiler = StepProfiler(config, done=progress.iteration)
    if dist.get_rank() == 0:
        print(f"starting from {start.origin}", flush=True)
        if progress.iteration >= config.train_iters:
            print(f"nothing left to do: the run has {config.train_iters:,} steps; ask for more to go on", flush=True)
    model, optimizer = build(config, start)
    data = micro_batches(
        rows,
        order,
        consumed_samples=progress.consumed_samples,
        num_workers=config.data.num_workers,
        isolate_documents=config.data.isolate_documents,
        **this_rank,
    )
    if platform.is_cuda():
        data = prefetched(data, depth=2 * num_micro_batches(config), pin=True)
    if on_checkpoint is not None:
        on_checkpoint(progress, account)
    late = reads_late(config, optimizer)
    with (
        MetricsLog(config, resumed_iteration=progress.iteration) as log,
        stop_on_sigterm() as stop_requested,
        profiler,
        closing(data),
    ):
        best = BestCheckpoint(config)
        reader = StepReader(config, order, log, late=late)
        while progress.iteration < config.train_iters and not (reader.stop_requested or best.exhausted):
            lr = learning_rate(config.schedule, step=progress.iteration, samples=progress.consumed_samples)
            before = progress
            progress = Progress(before.iteration + 1, before.consumed_samples + config.global_batch_size)
            with profiler.step(progress.iteration):
                step = start_step(model, optimizer, data, config, lr=lr)
                norm = parameters_norm(model) if config.log_params_norm else None
                reader.add(step, before, progress, lr=lr, stop=stop_requested(), params_norm=norm)

            evaluates = bool(evaluation_sets) and progress.iteration % config.eval_interval == 0
            due = config.save_interval > 0 and progress.iteration % config.save_interval == 0
            if evaluates or due or reader.stop_requested or progress.iteration == config.train_iters:
                reader.read_all()
                gather_parameters(model)
            if evaluates:
                losses = evaluate(model, evaluation_sets, config)
                log.evaluation(progress.iteration, losses)
                best.follow(losses, progress, model, optimizer, account)
                log.restart_clock()
            ends = reader.stop_requested or best.exhausted or progress.iteration == config.train_iters
            if config.save is not None and (due or ends):
                save_run(config, model, optimizer, progress, account)
                if on_checkpoint is not None:
                    on_checkpoint(progress, account)
                log.restart_clock()
    return TrainResult(progress.iteration, progress.consumed_samples, reader.lm_loss, reader.stop_requested)


def check_sizes(config: TrainConfig, ranks: int | None = None) -> None:
    """Raise InputError unless batch, ranks (None: those that run now) and model divide as they must."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    config.model.check_layout(tp, pp)
    ranks = ranks or dist.get_world_size()
    if ranks % (tp * pp):
        raise InputError(f"{ranks} ranks do not split into TP {tp} x PP {pp}: start a multiple of {tp * pp} ranks")
    data_parallel = ranks // (tp * pp)
    batch = config.micro_batch_size * data_parallel
    if config.micro_batch_size < 1 or config.global_batch_size < 1 or config.global_batch_size % batch:
        raise SettingError(
            "global_batch_size",
            f"global batch size {config.global_batch_size} is not a multiple of micro-batch size "
            f"{config.micro_batch_size} x {data_parallel} data-parallel ranks = {batch}: change one of them",
        )
    tokens = config.micro_batch_size * config.seq_length
    if config.speed.fp8 != "off" and tokens % MULTIPLE:
        raise InputError(
            f"--fp8: a micro-batch of {config.micro_batch_size} x {config.seq_length} = {tokens} tokens is not a "
            f"multiple of {MULTIPLE}, as fp8 products need it: change its size, or drop the flag"
        )
    if config.seq_length > config.model.max_sequence_length:
        raise InputError(
            f"sequence length {config.seq_length} exceeds the model's {config.model.max_sequence_length} positions: "
            "take shorter rows, or raise --max-position-embeddings"
        )
    tied_twice = pp > 1 and config.model.tie_word_embeddings and parallel.use_distributed_optimizer
    if config.optimizer.states != "fp32" and tied_twice:
        raise InputError(
            f"--optimizer-states {config.optimizer.states} rounds by chance, and the two copies of the embedding, on "
            "the first and the last pipeline stage and sharded differently, would drift apart: drop the flag, the "
            "pipeline or the distributed optimizer"
        )
    if parallel.sequence_parallel and config.seq_length % tp:
        raise InputError(
            f"sequence parallelism splits sequences of {config.seq_length} over TP {tp}, which does not divide it: "
            "change one of them, or drop --sequence-parallel"
        )


def _rank_of_order(config: TrainConfig) -> dict[str, int]:
    return {
        "micro_batch_size": config.micro_batch_size,
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }


def build(config: TrainConfig, start: Start) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """This rank's model with its weights, wrapped for data parallelism, and its optimizer, ready to go on."""
    parallel = config.parallel
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    stage = build_model(config.model, parallel, dtype=dtype, speed=config.speed)
    load_weights(stage, start.weights, config.model, parallel)
    if config.lora is not None:
        add_lora(stage, config, start)
    # Weights first: wrapping moves them into flat buffers, and the optimizer takes its fp32 copies from those.
    model = DistributedDataParallel(
        stage.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        stage,
    )
    stage.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        stage.config.no_sync_func = model.no_sync
    optimizer = build_optimizer(
        model, config.optimizer, parallel, bf16=config.bf16, fused="adamw" in config.speed.fusions
    )
    load_run(start, config, model, optimizer)
    return model, optimizer


def gather_parameters(model: DistributedDataParallel) -> None:
    """Have every rank's updated weights here, where otherwise the next training step's forward pass gathers them."""
    if model.ddp_config.overlap_param_gather:
        model.start_param_sync(force_sync=True)


@torch.no_grad()
def parameters_norm(model: DistributedDataParallel) -> Tensor:
    """L2 norm of all parameters of the model, each counted once whatever the layout; fp64 ()."""
    gather_parameters(model)
    total = torch.zeros((), dtype=torch.float64, device=platform.device())
    for parameter in model.parameters():
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
            total += parameter.detach().double().square().sum()
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt()


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], Tensor]]:
    """Catch SIGTERM inside; the yielded function tells, on all ranks alike, whether any of them got one: 1.0 or 0.0."""
    received = False

    def note(signum: int, frame: object) -> None:
        nonlocal received
        received = True

    def requested() -> Tensor:
        anywhere = torch.full((1,), float(received), device=platform.device())
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return anywhere

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, previous)
