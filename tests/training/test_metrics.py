"""What a run tells of its speed: the keys of metrics.jsonl and the parts of the log line, with what they count.

Planted: 6 N without the attention's FLOPs, and a peak in FLOP/s taken for TFLOP/s: each fails.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.training import flags, pretrain
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.training_runs import SEQ, metrics_of, tiny_config, tiny_weights, write_rows

PEAK = 0.25  # TFLOP/s, as given


def told(data: Path, save: Path, peak_tflops: float | None) -> str:
    from megatron.crystalcoder.training.loop import train

    said = StringIO()
    with redirect_stdout(said):
        config = tiny_config(data, save, train_iters=3, peak_tflops=peak_tflops)
        train(config, initial_weights=cast(Any, tiny_weights()))
    return said.getvalue()


@pytest.mark.parametrize("peak", [None, PEAK])
def test_line_and_file_tell_the_same(tmp_path: Path, peak: float | None) -> None:
    write_rows(tmp_path / "rows.jsonl")
    [said] = run_on_ranks(1, told, tmp_path / "rows.jsonl", tmp_path / "run", peak)
    lines = [line for line in said.splitlines() if line.startswith("iteration")]
    metrics = metrics_of(tmp_path / "run")
    assert len(lines) == len(metrics) == 3
    for line, facts in zip(lines, metrics, strict=True):
        assert f"| {facts['tokens_per_second']:,.0f} tok/s |" in line
        assert f"| peak memory {facts['peak_memory_bytes'] / 2**30:.2f} GiB |" in line
        assert f"| data wait {facts['data_wait_s']:.3f} s |" in line
        assert facts["peak_memory_bytes"] > 100e6
        if peak is None and not torch.cuda.is_available():
            assert facts["mfu"] is None
            assert "MFU" not in line
    if peak is not None:
        # 6 N + 12 L h s, written out.
        flops = 6 * TINY.num_parameters + 12 * TINY.num_layers * TINY.hidden_size * SEQ
        for line, facts in zip(lines, metrics, strict=True):
            assert facts["mfu"] == pytest.approx(facts["tokens_per_second"] * flops / 0.25e12)
            assert f"| MFU {100 * facts['mfu']:.1f}% |" in line
    assert all(re.search(r"ETA \d+:\d\d:\d\d$", line) for line in lines)


def test_peak_must_be_a_positive_number() -> None:
    for parse in (flags.parser().parse_args, pretrain.parse):
        with pytest.raises(InputError, match="--peak-tflops: 0 is not a positive number"):
            parse(["--params", "x.yaml", "--peak-tflops", "0"])
