"""Conversion against `cp` of the same bytes: Hugging Face -> Megatron and back, both formats, on one disk.

python -m tools.bench convert              the 7B model cut to 2 layers
python -m tools.bench.convert --full       all 32 layers in fp32: 54 GB of disk, some minutes
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron.crystalcoder.checkpoint.blocks import Files
from megatron.crystalcoder.checkpoint.companions import write_companions
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.hf_config import from_hf, packaged_directory, read_json
from megatron.crystalcoder.checkpoint.tensor_files import TensorRef, describe_torch
from megatron.crystalcoder.checkpoint.weights import logical_shapes
from megatron.crystalcoder.model.config import ModelConfig
from tools.bench.report import Table

LAYERS = 2  # of the 7B model's 32: its tensors have their real shapes, and the run fits a laptop's disk
HEADER = ("way", "dtype", "workers", "compared", "s", "GB / s", "cp, s", "share of cp's speed", "peak RSS, GB")
Compared = Literal["nothing", "tensors", "tensors, logits"]


def measure() -> Table:
    """Each way, with one worker and two, without and with comparing every tensor; `cp` is timed beside each."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), rounds=2)
        for dtype in (torch.bfloat16, torch.float32):
            bench.make_source(replace(_seven_b(), num_layers=LAYERS), dtype)
            for format in ("torch", "torch_dist"):
                ways: tuple[tuple[int, Compared], ...] = ((1, "tensors"), (2, "nothing"), (2, "tensors"))
                rows += [bench.there(format, *way) for way in ways]
                rows += [bench.back(format, *way) for way in ways]
                shutil.rmtree(bench.megatron)
            shutil.rmtree(bench.hf)
    return Table(
        "convert",
        "Checkpoint conversion",
        f"The 7B model cut to {LAYERS} layers, from .bin at TP2 and back to safetensors; page cache warm; best of 2, "
        "`cp` of the same files timed in turn with each, nothing left to write before either begins.",
        HEADER,
        rows,
    )


def measure_full() -> Table:
    """The whole 7B model in fp32, each way once, every tensor compared."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), rounds=1)
        bench.make_source(_seven_b(), torch.float32)
        rows = [bench.there("torch", 2, "tensors", is_last=True), bench.back("torch", 2, "tensors", is_last=True)]
        bench.back_becomes_source()
        rows += [bench.there("torch_dist", 2, "tensors", is_last=True)]
        rows += [bench.back("torch_dist", 2, "tensors"), bench.back("torch_dist", 2, "tensors, logits")]
    return Table(
        "convert-full",
        "Checkpoint conversion at 7B",
        "All 32 layers in fp32, TP2 PP4; larger than the page cache, so the disk is part of it; `cp` of the same files "
        "just before each. `python -m tools.bench.convert --full`.",
        HEADER,
        rows,
    )


class _Bench:
    """A source, and conversions of it, each in a process of its own so that its peak memory is known."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.hf, self.megatron, self._back, self._copy = (folder / name for name in ("hf", "megatron", "back", "copy"))
        self._rounds, self._dtype = rounds, ""

    def make_source(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """A `.bin` checkpoint of four shards, written without ever being in memory."""
        self.hf.mkdir()
        self._dtype = str(dtype).removeprefix("torch.")
        names = list(logical_shapes(config))
        weight_map: dict[str, str] = {}
        for shard in range(4):
            file = f"pytorch_model-{shard + 1:05d}-of-00004.bin"
            mine = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
            with torch.serialization.skip_data():
                torch.save(
                    {name: torch.empty(logical_shapes(config)[name], dtype=dtype) for name in mine}, self.hf / file
                )
            with Files(writable=True) as files:
                for ref in describe_torch(self.hf / file).values():
                    _fill(files, ref)
            weight_map |= dict.fromkeys(mine, file)
        (self.hf / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        write_companions(self.hf, config, read_json(packaged_directory() / "config.json"), {}, dtype)

    def there(self, format: str, workers: int, compared: Compared, is_last: bool = False) -> tuple[str, ...]:
        """Hugging Face to Megatron; the result stays for the way back. is_last: the source is removed afterwards."""
        layout = {"tensor_parallel": 2, "pipeline_parallel": 4 if is_last else 1}
        return self._measured(self.hf, self.megatron, format, workers, compared, is_last, layout)

    def back(self, format: str, workers: int, compared: Compared, is_last: bool = False) -> tuple[str, ...]:
        """Megatron to Hugging Face."""
        row = self._measured(self.megatron, self._back, "hf", workers, compared, is_last, {})
        if not is_last:
            shutil.rmtree(self._back)
        return (row[0].replace("megatron", format), *row[1:])

    def back_becomes_source(self) -> None:
        """What came back is the next source."""
        self._back.rename(self.hf)

    def _measured(
        self, source: Path, target: Path, format: str, workers: int, compared: Compared, is_last: bool, layout: Any
    ) -> tuple[str, ...]:
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        copied = seconds = float("inf")
        for _ in range(self._rounds):
            os.sync()  # or each would wait for what the one before it has left to write
            start = time.perf_counter()
            subprocess.run(["cp", "-r", source, self._copy], check=True)
            copied = min(copied, time.perf_counter() - start)
            shutil.rmtree(self._copy)
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            checks = {"verify": compared != "nothing", "logits": "logits" in compared}
            options = {"format": format, "workers": workers, **checks, **layout}
            once = [
                sys.executable,
                "-m",
                "tools.bench.convert",
                "--once",
                str(source),
                str(target),
                json.dumps(options),
            ]
            result = json.loads(subprocess.run(once, check=True, capture_output=True, text=True).stdout)
            seconds = min(seconds, result["seconds"])
        if is_last:
            shutil.rmtree(source)
        way = f"HF -> {format}" if format != "hf" else "megatron -> HF"
        speeds = (
            f"{seconds:.2f}",
            f"{size / seconds / 1e9:.2f}",
            f"{copied:.2f}",
            f"{copied / seconds:.0%}",
            f"{result['rss'] / 1e9:.2f}",
        )
        return (way, self._dtype, str(workers), compared, *speeds)


def _seven_b() -> ModelConfig:
    packaged = packaged_directory() / "config.json"
    return from_hf(read_json(packaged), packaged)


def _fill(files: Files, ref: TensorRef) -> None:
    """Normal numbers, from a pool at random places: as random as a disk and a comparison can tell."""
    generator = np.random.default_rng(ref.offset)
    pool = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 22, np.float32)).to(ref.dtype)
    raw = pool.view(torch.uint8).numpy()
    nbytes, done = torch.Size(ref.shape).numel() * ref.dtype.itemsize, 0
    while done < nbytes:
        start = int(generator.integers(0, pool.numel() // 2)) * ref.dtype.itemsize
        part = raw[start : start + nbytes - done]
        files.write(ref.file, ref.offset + done, part)
        done += part.size


def _once(source: str, target: str, options: str) -> None:
    """One conversion in this process: its seconds, imports left out, and the process's peak memory in bytes."""
    start = time.perf_counter()
    convert(Path(source), Path(target), **json.loads(options), report=lambda line: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "rss": peak}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="the whole 7B model, once")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        _once(*arguments.once)
    else:
        table = measure_full() if arguments.full else measure()
        print(table.markdown())
        table.write()
