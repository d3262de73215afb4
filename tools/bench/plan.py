"""What `crystalcoder plan` predicts against runs: memory of the fullest rank, and time once the speed is calibrated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.training.memory import Layout, Savings, rank_memory
from megatron.crystalcoder.training.plan import stage_flops_per_token
from tools.bench.plan_rank import LOSS_CHUNK
from tools.bench.report import Table

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=512, num_layers=6, num_attention_heads=8, ffn_hidden_size=1364, rotary_dim=16
)
WIDE = replace(MODEL, hidden_size=768, num_attention_heads=12, ffn_hidden_size=2048, num_layers=3)
SEQUENCE = 512


@dataclass(frozen=True)
class Case:
    """A run to measure: a model, a layout, the sequences of a step."""

    name: str
    model: ModelConfig
    layout: Layout
    global_batch: int = 8


CASES = (
    Case("one rank", MODEL, Layout(micro_batch=8)),
    Case("one rank, micro-batches of 2", MODEL, Layout(micro_batch=2)),
    Case("one rank, full recomputation", MODEL, Layout(micro_batch=8, recompute="full")),
    Case("one rank, wider and shallower", WIDE, Layout(micro_batch=8)),
    Case("TP2, sequence parallel", MODEL, Layout(tp=2, micro_batch=8, sequence_parallel=True)),
    Case("PP2", MODEL, Layout(pp=2, micro_batch=2)),
    Case("DP2, distributed optimizer", MODEL, Layout(dp=2, micro_batch=4, distributed_optimizer=True)),
)


def measure() -> Table:
    """Run and predict each case; times by the first one's FLOPs per CPU second."""
    rows: list[tuple[str, ...]] = []
    rate = 0.0
    for case in CASES:
        ranks = _run(case)
        peak, seconds = max(rank["bytes"] for rank in ranks), sum(rank["cpu_seconds"] for rank in ranks)
        print(f"{case.name}: {ranks}", file=sys.stderr, flush=True)
        flops, memory = _flops(case), predicted_bytes(case)
        rate = rate or flops / seconds
        rows.append(
            (
                case.name,
                f"{memory / 2**20:,.0f}",
                f"{peak / 2**20:,.0f}",
                f"{memory / peak:.2f}",
                f"{flops / rate:.1f}",
                f"{seconds:.1f}",
                f"{flops / rate / seconds:.2f}",
            )
        )
    return Table(
        "plan",
        "What `crystalcoder plan` predicts",
        f"{MODEL.num_parameters / 1e6:.0f}M parameters (the wider one {WIDE.num_parameters / 1e6:.0f}M), sequence "
        f"{SEQUENCE}, batch 8, fp32, one thread a rank. Memory: growth of the fullest rank's resident set over that "
        "before the model was built, at its peak; predicted with `compiled` off, as on a CPU. Time: CPU seconds of a "
        "step, all ranks together, predicted from its FLOPs by the speed of the first row (what `--mfu` stands "
        "for); communication between processes of one machine is memory copies and is not predicted.",
        ("run", "MiB predicted", "measured", "ratio", "CPU s predicted", "measured", "ratio"),
        rows,
    )


def predicted_bytes(case: Case) -> int:
    """Of the rank that needs most."""
    layout = case.layout
    return max(
        rank_memory(
            case.model,
            layout,
            seq_length=SEQUENCE,
            micro_batches=case.global_batch // layout.dp // layout.micro_batch,
            bf16=False,
            stage=stage,
            savings=Savings(loss_chunk=LOSS_CHUNK),
            compiled=False,
        ).total
        for stage in range(layout.pp)
    )


def _flops(case: Case) -> float:
    """Of one step, on all ranks."""
    return stage_flops_per_token(case.model, SEQUENCE, 1, case.layout.recompute) * case.global_batch * SEQUENCE


def _run(case: Case) -> list[dict[str, Any]]:
    """What each rank measured."""
    job = {
        "model": {name: value for name, value in asdict(case.model).items() if name != "mup"},
        "layout": asdict(case.layout),
        "global_batch": case.global_batch,
        "seq_length": SEQUENCE,
    }
    ranks = case.layout.tp * case.layout.pp * case.layout.dp
    with tempfile.TemporaryDirectory() as folder:
        program = ["-m", "tools.bench.plan_rank", json.dumps(job), folder]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), *program],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"},
        )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
