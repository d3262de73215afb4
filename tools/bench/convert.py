"""Conversion against `cp` of the same bytes: Hugging Face -> Megatron and back, both formats, on one disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.hf_config import from_hf, packaged_directory, read_json
from megatron.crystalcoder.checkpoint.hf_writer import write_companions, write_weights
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.checkpoint.verify import Cast
from megatron.crystalcoder.model.initialization import InitSettings
from tools.bench.report import Table

LAYERS = 2  # of the 7B model's 32: its tensors have their real shapes, and the run fits a laptop's disk


def measure() -> Table:
    """Seconds of each direction without and with verification, and of copying the source."""
    packaged = packaged_directory() / "config.json"
    config = replace(from_hf(read_json(packaged), packaged), num_layers=LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "hf")
        source.mkdir()
        weights = Cast(RandomWeights(config, InitSettings.for_hf(config), seed=1), torch.bfloat16, "random weights")
        write_weights(source, weights)
        write_companions(source, config, read_json(packaged), None, torch.bfloat16)
        size = sum(path.stat().st_size for path in source.iterdir())
        copied = _best(lambda target: shutil.copytree(source, target), Path(folder, "copy"))
        rows = [_row("cp", size, copied, copied)]
        for format in ("torch", "torch_dist"):
            megatron = Path(folder, format)
            for verify in (False, True):

                def there(target: Path, format: str = format, verify: bool = verify) -> None:
                    convert(source, target, format=format, tensor_parallel=2, verify=verify, report=_quiet)  # type: ignore[arg-type]

                rows.append(_row(f"HF -> {format}{', verified' * verify}", size, _best(there, megatron), copied))
            convert(source, megatron, format=format, tensor_parallel=2, report=_quiet)
            for verify in (False, True):

                def back(target: Path, megatron: Path = megatron, verify: bool = verify) -> None:
                    convert(megatron, target, format="hf", verify=verify, report=_quiet)

                row = _row(f"{format} -> HF{', verified' * verify}", size, _best(back, Path(folder, "back")), copied)
                rows.append(row)
            shutil.rmtree(megatron)
    return Table(
        "convert",
        "Checkpoint conversion",
        f"The 7B model cut to {LAYERS} layers, bf16, {size / 1e9:.2f} GB, TP2; page cache warm; best of 2.",
        ("way", "s", "GB / s", "share of cp's speed"),
        rows,
    )


def _best(run: Callable[[Path], object], target: Path, rounds: int = 2) -> float:
    """Best wall seconds; the target is removed before each round and after the last."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run(target)
        best = min(best, time.perf_counter() - start)
        shutil.rmtree(target)
    return best


def _row(way: str, size: int, seconds: float, copied: float) -> tuple[str, ...]:
    return way, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{copied / seconds:.0%}"


def _quiet(line: str) -> None:
    """Leave out the converter's own report."""
