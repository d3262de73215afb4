"""`crystalcoder plan`: what a params.yaml will take of a cluster, before it takes any: memory, layouts, days, cost."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn, get_args

from data_prep.errors import InputError
from megatron.crystalcoder.model.fusions import Fp8
from megatron.crystalcoder.training.memory import Layout, OptimizerStates, Savings
from megatron.crystalcoder.training.params import Params, load_params
from megatron.crystalcoder.training.plan import (
    GPUS,
    GPUS_PER_NODE,
    RECOMPUTE,
    RESERVED_SHARE,
    Candidate,
    Cluster,
    Job,
    candidate,
    flops_per_token,
    rank_layouts,
)

_GIB = 1 << 30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = _Parser(
        prog="crystalcoder plan",
        description="Memory, layouts, time and cost of a run, by formula: takes no GPU and reads no data.",
        allow_abbrev=False,
    )
    top.add_argument("--params", type=Path, required=True, help="the YAML file: params/phase1/params.yaml, ...")
    top.add_argument("--gpus", type=int, required=True, help="how many")
    top.add_argument("--gpu", choices=sorted(GPUS), required=True, help="which (a100: that of 80 GB)")
    top.add_argument("--micro-batch-size", type=int, help="only layouts of this many sequences per micro-batch")
    top.add_argument("--tp", type=int, help="only this tensor-parallel size")
    top.add_argument("--pp", type=int, help="only this many pipeline stages")
    top.add_argument(
        "--mfu",
        type=float,
        default=Cluster.mfu,
        help=f"share of its bf16 peak that a GPU reaches while it computes; an assumption, default {Cluster.mfu}",
    )
    top.add_argument("--network", type=float, default=50.0, help="GB/s per GPU between nodes; default: 50 (400 Gb/s)")
    top.add_argument("--price", type=float, help="per GPU and hour, to have the cost")
    top.add_argument("--top", type=int, default=10, help="layouts to list; default: 10")
    saved = top.add_argument_group(
        "as for crystalcoder pretrain; the memory follows them, the predicted time knows of offloading alone"
    )
    saved.add_argument("--optimizer-states", choices=get_args(OptimizerStates), default="fp32")
    saved.add_argument("--fp8", choices=get_args(Fp8), default="off")
    saved.add_argument("--offload-activations", action="store_true")
    saved.add_argument("--loss-chunk", type=int, default=0, metavar="TOKENS")
    saved.add_argument("--ffn-multiple-of", type=int, default=0, metavar="N")
    top.add_argument("overrides", nargs="*", metavar="key.path=value", help="put in place of the file's values")
    return top


def main(arguments: list[str]) -> None:
    """The `crystalcoder plan` subcommand."""
    options = parser().parse_intermixed_args(arguments)
    for name in ("gpus", "micro_batch_size", "tp", "pp", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu {options.mfu:g}: is a share, above 0 and at most 1")
    for name in ("network", "price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value:g}: must be above 0")
    for name in ("loss_chunk", "ffn_multiple_of"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 0")
    params = load_params(options.params, options.overrides)
    config = params.train_config()
    savings = Savings(options.optimizer_states, options.fp8 != "off", options.offload_activations, options.loss_chunk)
    batch = config.global_batch_size
    job = Job(config.model, batch, config.seq_length, config.bf16, savings, options.ffn_multiple_of)
    cluster = Cluster(GPUS[options.gpu], options.gpus, options.mfu, options.network * 1e9)
    layouts = rank_layouts(job, cluster, tp=options.tp, pp=options.pp, micro_batch=options.micro_batch_size)
    print(describe_run(params, job, config.train_iters))
    print(describe_layouts(layouts[: options.top], cluster, config.train_iters, options.price, len(layouts)))
    print(describe_memory(job, layouts[0], cluster))
    words = [pretrain_arguments(layouts[0].layout), *_saving_arguments(options)]
    print(f"\nthe first one's arguments for crystalcoder pretrain: {' '.join(words)}")


def describe_run(params: Params, job: Job, steps: int) -> str:
    """Parameters, tokens and FLOPs of the whole run."""
    batch = job.global_batch * job.seq_length
    per_token = flops_per_token(job.model, job.seq_length)
    return (
        f"{params.file.path}: {job.model.num_parameters:,} parameters, {'bf16' if job.bf16 else 'fp32'}\n"
        f"{steps:,} steps of {job.global_batch:,} x {job.seq_length:,} = {batch:,} tokens: {steps * batch:,} tokens\n"
        f"{per_token / 1e9:.4g} GFLOP per token (6 N + 12 L h s): {per_token * steps * batch:.4g} FLOPs"
    )


def describe_layouts(layouts: list[Candidate], cluster: Cluster, steps: int, price: float | None, total: int) -> str:
    """The table of layouts, the fastest first."""
    lines = [
        f"\nlayouts that divide the model and fit {cluster.count} x {cluster.gpu.memory / _GIB:.0f} GiB "
        f"({RESERVED_SHARE:.0%} left free): {total}; the fastest, assuming {cluster.mfu:.0%} of peak while computing:",
        f"{'TP':>3}{'PP':>4}{'DP':>6}{'micro':>7}  {'recompute':<11}{'GiB/GPU':>8}{'s/step':>10}{'MFU':>7}{'days':>11}"
        + (f"{'cost':>15}" if price else ""),
    ]
    for each in layouts:
        layout, hours = each.layout, each.step_seconds * steps / 3600
        lines.append(
            f"{layout.tp:>3}{layout.pp:>4}{layout.dp:>6}{layout.micro_batch:>7}  {layout.recompute:<11}"
            f"{each.memory.total / _GIB:>8.1f}{each.step_seconds:>10.4g}{each.mfu:>7.1%}{hours / 24:>11.4g}"
            + (f"{hours * cluster.count * price:>15,.0f}" if price else "")
        )
    return "\n".join(lines)


def describe_memory(job: Job, best: Candidate, cluster: Cluster) -> str:
    """GiB of each part on the fullest rank of the first layout, with each kind of recomputation."""
    columns = [candidate(job, replace(best.layout, recompute=kind), cluster).memory for kind in RECOMPUTE]
    lines = [
        f"\nGiB on the fullest rank of the first, by recomputation:\n{'':<14}"
        + "".join(f"{kind:>11}" for kind in RECOMPUTE)
    ]
    parts = [each.name for each in fields(best.memory) if each.name != "host"] + ["total"]
    for part in parts + ["host"] * job.savings.offload_activations:
        lines.append(f"  {part:<12}" + "".join(f"{getattr(column, part) / _GIB:>11.2f}" for column in columns))
    return "\n".join(lines)


def _saving_arguments(options: argparse.Namespace) -> list[str]:
    words = [f"--optimizer-states {options.optimizer_states}"] if options.optimizer_states != "fp32" else []
    words += [f"--fp8 {options.fp8}"] if options.fp8 != "off" else []
    words += ["--offload-activations"] if options.offload_activations else []
    words += [f"--loss-chunk {options.loss_chunk}"] if options.loss_chunk else []
    words += [f"--ffn-multiple-of {options.ffn_multiple_of}"] if options.ffn_multiple_of else []
    return words


def pretrain_arguments(layout: Layout) -> str:
    """The flags that make `crystalcoder pretrain` run this layout; on several nodes torchrun starts the ranks."""
    words = [f"--tp {layout.tp} --pp {layout.pp} --micro-batch-size {layout.micro_batch}"]
    words += ["--sequence-parallel"] if layout.sequence_parallel else []
    words += ["--use-distributed-optimizer"] if layout.distributed_optimizer else []
    words += [f"--recompute-granularity {layout.recompute}"] if layout.recompute != "none" else []
    ranks = layout.tp * layout.pp * layout.dp
    words += [f"--nproc {ranks}"] if layout.tp * layout.pp < ranks <= GPUS_PER_NODE else []
    return " ".join(words)
