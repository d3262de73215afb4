"""Pretraining from a params.yaml, on this rank: what `crystalcoder pretrain` and pretrain_crystalcoder.py run.

Under torchrun (or any launcher that sets its environment variables) this is one rank of a job; alone it is all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from data_prep.errors import InputError, exit_on_bad_input
from megatron.crystalcoder import platform  # before megatron.core: it answers the questions about CUDA asked on import
from megatron.crystalcoder.checkpoint.companions import tokenizer_files
from megatron.crystalcoder.data.loader import open_data
from megatron.crystalcoder.data.mixture import MixtureOrder
from megatron.crystalcoder.data.reference_order import ReferenceOrder
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.accounting import Accounting, dataset_names
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.export import Exporter
from megatron.crystalcoder.training.params import Mode, Params, ReferenceCompat
from megatron.crystalcoder.training.phases import Phase, one_phase, several_phases
from megatron.crystalcoder.training.resume import Progress
from megatron.crystalcoder.training.speed_flags import add_speed_arguments, with_speed_flags

# Set for the ranks by the process that has checked everything before starting them.
CHECKED = "CRYSTALCODER_CHECKED"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def parser() -> argparse.ArgumentParser:
    """The arguments of both commands."""
    top = _Parser(
        prog="crystalcoder pretrain",
        description="Pretrain from a params.yaml.",
        epilog="On CS-2 systems: crystalcoder pretrain --target CSX ... (--target CSX --help lists its arguments).",
        allow_abbrev=False,
    )
    top.add_argument(
        "--params",
        type=Path,
        required=True,
        help="the YAML file: params/phase1/params.yaml, ...; with --phases their directory, or a path with {n}",
    )
    top.add_argument(
        "--phases", metavar="1,2,3", help="run these one after the other, each from the weights of the one before"
    )
    top.add_argument(
        "--model_dir", "--model-dir", type=Path, help="checkpoints and metrics go here; a run found here is continued"
    )
    top.add_argument(
        "--checkpoint_path",
        "--checkpoint-path",
        type=Path,
        help="weights to begin with: a Megatron or Hugging Face directory",
    )
    top.add_argument(
        "--new-data-order",
        action="store_true",
        help="let a run that is continued go on with other data, weights or order than it stopped in",
    )
    top.add_argument("--data_root", "--data-root", type=Path, help="what relative data directories are relative to")
    top.add_argument(
        "--export-every",
        type=int,
        metavar="K",
        help="write every K-th checkpoint, and the last, as a Hugging Face directory to MODEL_DIR/exports",
    )
    top.add_argument(
        "--export-tokenizer", type=Path, metavar="PATH", help="tokenizer to put into each export: a directory or file"
    )
    top.add_argument("--mode", choices=("train", "eval", "train_and_eval"), help="default: runconfig.mode")
    top.add_argument("--tp", "--tensor-model-parallel-size", type=int, default=1, help="tensor-parallel ranks")
    top.add_argument("--pp", "--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages")
    top.add_argument(
        "--sequence-parallel", action="store_true", help="split activations over the tensor-parallel ranks too"
    )
    top.add_argument(
        "--use-distributed-optimizer", action="store_true", help="shard Adam's state over data-parallel ranks"
    )
    top.add_argument(
        "--recompute-granularity", choices=("selective", "full"), help="recompute activations, to save memory"
    )
    top.add_argument(
        "--micro-batch-size", type=int, help="default: the largest of at most 4,096 tokens that divides the batch"
    )
    reference = top.add_argument_group("as the CS-2 run did it (modelzoo 1.9.1), instead of the sound way")
    reference.add_argument("--reference-compat", action="store_true", help="all of the following")
    reference.add_argument("--reference-order", action="store_true", help="its data order, mistakes of it included")
    reference.add_argument("--reference-adam", action="store_true", help="Adam's eps added before bias correction")
    reference.add_argument("--reference-init", action="store_true", help="the gate's bias drawn uniformly, not 0")
    top.add_argument(
        "--nproc", type=int, help="ranks to start on this machine; default: --tp x --pp, with --nodes 8 on each"
    )
    top.add_argument(
        "--nodes", type=int, help="check everything for so many nodes, start nothing, and print the lines that start it"
    )
    top.add_argument(
        "--max-restarts",
        type=int,
        help="when a rank dies, go on from the last checkpoint, so many times; default: 3, for a lone rank 0",
    )
    add_speed_arguments(top.add_argument_group("speed and memory, the result being the same"))
    top.add_argument("overrides", nargs="*", metavar="key.path=value", help="put in place of the file's values")
    return top


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Phase]]:
    """The arguments, and the runs that they name: one, or with --phases several. Raises InputError."""
    options = parser().parse_intermixed_args(arguments)
    for name in ("tp", "pp", "micro_batch_size", "nproc", "nodes", "export_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.export_tokenizer is not None:
        if options.export_every is None:
            raise InputError("--export-tokenizer needs --export-every: add it, or drop both")
        tokenizer_files(options.export_tokenizer)
    if options.max_restarts is not None and options.max_restarts < 0:
        raise InputError(f"--max-restarts {options.max_restarts}: must be at least 0")
    every = options.reference_compat
    reference = ReferenceCompat(
        order=every or options.reference_order,
        adam=every or options.reference_adam,
        init=every or options.reference_init,
    )
    places = {"model_dir": options.model_dir, "checkpoint_path": options.checkpoint_path}
    if options.phases is None:
        phases = [one_phase(options.params, options.overrides, reference, **places)]
    else:
        phases = several_phases(options.phases, options.params, options.overrides, reference, **places)
        if len(phases) > 1 and mode_of(options, phases[0]) == "eval":
            raise InputError(f"--phases {options.phases}: evaluate one phase at a time")
    for phase in phases:
        if (options.mode or "train") != "train" and phase.params.values.eval_input is None:
            raise InputError(f"{phase.params.file.path}: --mode {options.mode} needs an eval_input section: add one")
    return options, phases


def mode_of(options: argparse.Namespace, phase: Phase) -> Mode:
    """What to do: the argument, or else the file's."""
    mode: Mode = options.mode or phase.params.values.runconfig.mode
    return mode


def train_config(options: argparse.Namespace, phase: Phase, world_size: int) -> TrainConfig:
    """The run of `world_size` ranks that arguments and file describe."""
    model_parallel = options.tp * options.pp
    config = phase.params.train_config(
        parallel=ParallelConfig(
            tensor_model_parallel_size=options.tp,
            pipeline_model_parallel_size=options.pp,
            sequence_parallel=options.sequence_parallel and options.tp > 1,
            use_distributed_optimizer=options.use_distributed_optimizer,
            recompute=options.recompute_granularity or "none",
        ),
        dp_size=max(1, world_size // model_parallel),
        micro_batch_size=options.micro_batch_size,
        mode=options.mode,
        model_dir=phase.model_dir,
        checkpoint_path=phase.checkpoint_path,
        data_root=options.data_root,
    )
    return with_speed_flags(replace(config, phase=phase.number, new_data_order=options.new_data_order), options)


def check_before_start(options: argparse.Namespace, phases: Sequence[Phase], world_size: int) -> None:
    """Raise InputError for anything that would stop these runs on `world_size` ranks, naming the line to change."""
    from megatron.crystalcoder.training.preflight import check

    configs = [train_config(options, phase, world_size) for phase in phases]
    check(phases, configs, world_size, mode=mode_of(options, phases[0]), data_root=options.data_root)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank. Exit codes: 2 bad input, 3 the run diverged, 143 a SIGTERM was answered by saving."""
    with exit_on_bad_input():
        options, phases = parse(sys.argv[1:] if arguments is None else arguments)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if int(os.environ.get("RANK", "0")) == 0 and CHECKED not in os.environ:
            check_before_start(options, phases, world_size)
        platform.initialize()
        if mode_of(options, phases[0]) == "eval":
            _evaluate(train_config(options, phases[0], world_size))
            platform.shutdown()
            return
        exporter = None
        if options.export_every is not None and int(os.environ.get("RANK", "0")) == 0:
            exporter = Exporter(options.export_every, options.export_tokenizer)
        try:
            _train(options, phases, world_size, exporter)
            platform.shutdown()  # the other ranks need not wait
        except BaseException:
            if exporter is not None:
                exporter.stop()
            raise
        if exporter is not None:
            exporter.wait()


def _train(
    options: argparse.Namespace, phases: Sequence[Phase], world_size: int, exporter: Exporter | None = None
) -> None:
    """The phases that are not finished, one after the other."""
    from megatron.crystalcoder.checkpoint.random_init import RandomWeights
    from megatron.crystalcoder.training.exit_codes import EXIT_DIVERGED, EXIT_INTERRUPTED
    from megatron.crystalcoder.training.loop import train
    from megatron.crystalcoder.training.phase_report import PhaseReport
    from megatron.crystalcoder.training.step_reader import NonFiniteError

    is_first = int(os.environ.get("RANK", "0")) == 0
    configs = [train_config(options, phase, world_size) for phase in phases]
    for number, (phase, config) in enumerate(zip(phases, configs, strict=True)):
        if len(phases) > 1 and phase.is_finished:
            if exporter is not None:
                exporter.follow(config)
            if is_first:
                print(f"{phase.name}: finished, in {phase.model_dir}", flush=True)
            continue
        params = phase.params
        later = list(zip(phases, configs, strict=True))[number + 1 :]
        report = PhaseReport(phase, config, later=later, summary=options.model_dir if options.phases else None)

        def on_checkpoint(
            progress: Progress, account: Accounting, config: TrainConfig = config, report: PhaseReport = report
        ) -> None:
            if is_first:
                report(progress, account)
            if exporter is not None:
                exporter.follow(config)

        if is_first:
            print(describe(config, params), flush=True)
        weights = RandomWeights(config.model, params.init_settings(), params.init_seed)
        try:
            result = train(config, initial_weights=weights, on_checkpoint=on_checkpoint)
        except NonFiniteError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_DIVERGED) from None
        if result.interrupted:
            raise SystemExit(EXIT_INTERRUPTED)


def _evaluate(config: TrainConfig) -> None:
    """Print the loss of each evaluation set and their mean: of `checkpoint_path`, or else of the run in `model_dir`."""
    import torch.distributed as dist

    from megatron.crystalcoder.training.evaluation import evaluate, open_evaluation_sets
    from megatron.crystalcoder.training.loop import build, check_sizes
    from megatron.crystalcoder.training.preflight import evaluation_config
    from megatron.crystalcoder.training.resume import find_start

    config = evaluation_config(config)
    check_sizes(config)
    platform.initialize_model_parallel(config.parallel, config.seed)
    sets = open_evaluation_sets(config)
    model, _ = build(config, find_start(config))
    losses = evaluate(model, sets, config)
    if dist.get_rank() == 0:
        print(json.dumps({"lm_loss": losses, "mean": sum(losses.values()) / len(losses)}), flush=True)


def describe(config: TrainConfig, params: Params) -> str:
    """What is about to run: the model, the tokens, the keys that change nothing, and how often each dataset is seen."""
    model, batch = config.model, config.global_batch_size * config.seq_length
    lines = [
        f"{params.file.path}: {model.num_parameters:,} parameters, {config.train_iters:,} steps of {batch:,} tokens "
        f"= {config.train_iters * batch:,} tokens"
    ]
    idle = params.without_effect()
    if idle:
        lines.append(f"accepted, but without effect outside CS-2: {', '.join(idle)}")
    rows, order = open_data(config.data, seq_length=config.seq_length, vocab_size=model.vocab_size)
    samples = config.train_iters * config.global_batch_size
    lines.append(f"data: {len(rows):,} rows; the run takes {samples:,} samples")
    if isinstance(order, MixtureOrder | ReferenceOrder) and config.data.mixture:
        drawn = zip(dataset_names(config.data), order.sources, order.drawn(samples), strict=True)
        for name, source, count in drawn:
            lines.append(
                f"  {name}: {count / samples:.2%} of the samples, {source.num_rows:,} rows "
                f"seen {count / source.num_rows:.2f} times"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
