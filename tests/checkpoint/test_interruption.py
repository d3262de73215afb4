"""Conversions that are killed, interrupted, or run out of disk: what is left, and how they go on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import blocks
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.directory import new_directory
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf

# Converts in this process, which kills itself in the middle: half way through its n-th write.
_KILLED = """
import os, signal, sys
from itertools import count
from pathlib import Path
from megatron.crystalcoder.checkpoint import blocks
from megatron.crystalcoder.checkpoint.convert import convert
write, number = blocks.Files.write, count(1)
def killed(self, file, offset, data):
    if next(number) >= int(sys.argv[4]):
        write(self, file, offset, data.reshape(-1)[: data.size // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, file, offset, data)
blocks.Files.write = killed
convert(Path(sys.argv[1]), Path(sys.argv[2]), format=sys.argv[3], tensor_parallel=2, pipeline_parallel=2)
"""


def _stop_after(writes: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `Files.write` succeed so many times, and raise from then on."""
    real, done = blocks.Files.write, 0

    def write(self: blocks.Files, *arguments: object) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise error()
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks.Files, "write", write)


@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
@pytest.mark.parametrize("writes", [1, 25, 60])
def test_killed_and_started_again(tmp_path: Path, format_: str, writes: int) -> None:
    weights = distinct_weights()
    hf, target = save_hf(tmp_path / "hf", weights), tmp_path / "m"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(hf), str(target), format_, str(writes)])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".m.partial").is_dir()
    assert not target.exists()
    convert(hf, target, format=format_, tensor_parallel=2, pipeline_parallel=2)
    assert_same_tensors(target, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]


def test_going_on_writes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = distinct_weights()
    hf, target = save_hf(tmp_path / "hf", weights), tmp_path / "m"
    written: list[Path] = []
    real = blocks.Files.write
    with monkeypatch.context() as patch:
        _stop_after(30, KeyboardInterrupt, patch)
        with pytest.raises(InputError, match="interrupted: the same command goes on from here"):
            convert(hf, target, format="torch", tensor_parallel=2, workers=1)
    assert (tmp_path / ".m.partial/conversion.json").is_file()

    def counted(self: blocks.Files, file: Path, *arguments: object) -> None:
        written.append(file)
        real(self, file, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Files, "write", counted)
        convert(hf, target, format="torch", tensor_parallel=2, workers=1)
    rest = len(written)
    convert(hf, tmp_path / "whole", format="torch", tensor_parallel=2, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(blocks.Files, "write", counted)
        convert(hf, tmp_path / "again", format="torch", tensor_parallel=2, workers=1)
    assert rest == len(written) - rest - 30
    for file in (tmp_path / "whole").rglob("*.pt"):  # checksums included, though they cover both halves
        assert file.read_bytes() == (target / file.relative_to(tmp_path / "whole")).read_bytes()
    assert not (target / "conversion.json").exists()


def test_another_job_for_the_same_target_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source changed, or the layout: what an interrupted run left is of no use."""
    hf, target = save_hf(tmp_path / "hf", distinct_weights()), tmp_path / "m"
    with monkeypatch.context() as patch:
        _stop_after(30, KeyboardInterrupt, patch)
        with pytest.raises(InputError, match="interrupted"):
            convert(hf, target, format="torch", tensor_parallel=2)
    (tmp_path / ".m.partial/stale").write_text("")
    other = distinct_weights(seed=6)
    convert(save_hf(tmp_path / "hf2", other), target, format="torch", tensor_parallel=2)
    assert_same_tensors(target, other)
    assert not (target / "stale").exists()


def test_two_processes_do_not_write_one_target(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    with new_directory(tmp_path / "m", overwrite=False, job={"by": "somebody"}) as partial:
        with pytest.raises(InputError, match="another process is writing it"):
            convert(hf, tmp_path / "m", format="torch")
        partial.laid_out()
    assert (tmp_path / "m").is_dir()


@pytest.mark.parametrize("format_", ["torch", "torch_dist", "hf"])
def test_full_disk(tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    with monkeypatch.context() as patch:
        _stop_after(20, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), patch)
        with pytest.raises(InputError, match=r"m: the disk is full \(No space left on device\)"):
            convert(hf, tmp_path / "m", format=format_)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs 0\.0 GB, and 0\.0 GB are free"):
        convert(hf, tmp_path / "m", format=format_)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


# The system's own refusal, at every place where files grow: the command's files may not become larger than that.
_LIMITED = """
import resource, signal, sys
from tools import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
arguments = ["--from", sys.argv[1], "--to", sys.argv[2], "--format"]
for limit in (2_000, 50_000, 300_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for format in ("torch", "torch_dist", "hf"):
        try:
            convert.main([*arguments, format])
        except SystemExit as stop:
            assert stop.code == 2, stop.code
"""


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights(), shards=1)
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(hf), str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line = f"error: {tmp_path}/m: the disk is full (File too large): make room, or choose another"
    assert done.stderr.splitlines() == [line] * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_one_tensor_larger_than_a_file_may_be(tmp_path: Path) -> None:
    """Its values are skipped over, so the file is short where it fails. Planted: an append there, which succeeds."""
    code = (
        "import resource, sys, torch; from pathlib import Path;"
        "from megatron.crystalcoder.checkpoint.tensor_files import save_torch;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY));"
        "save_torch({'model': {'a': torch.empty(2_000_000)}}, Path(sys.argv[1]), with_values=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pt")], capture_output=True, text=True, check=False
    )
    assert "OSError: [Errno 27] File too large" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("format_", ["torch", "torch_dist", "hf"])
def test_a_disk_that_writes_something_else(tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading back notices one wrong bit of one tensor; without it nobody does."""
    hf = save_hf(tmp_path / "hf", distinct_weights())
    real, done = blocks.Files.write, 0

    def write(self: blocks.Files, file: Path, offset: int, data: object) -> None:
        nonlocal done
        done += 1
        real(self, file, offset, data)  # type: ignore[arg-type]
        if done == 15:
            with file.open("r+b") as stream:
                stream.seek(offset)
                first = stream.read(1)[0]
                stream.seek(offset)
                stream.write(bytes([first ^ 1]))

    monkeypatch.setattr(blocks.Files, "write", write)
    with pytest.raises(InputError, match="was not written as it was read"):
        convert(hf, tmp_path / "m", format=format_)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("max_queue_size", [1, 50])
def test_workers_and_queue_do_not_change_the_result(tmp_path: Path, workers: int, max_queue_size: int) -> None:
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=4, workers=workers, max_queue_size=max_queue_size)
    assert_same_tensors(tmp_path / "m", weights)


def test_the_queue_bounds_the_tensors_in_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from megatron.crystalcoder.checkpoint.transfer import Transfer

    at_work, most, lock, real = 0, 0, threading.Lock(), Transfer._move

    def move(self: Transfer, job: object) -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.002)
        try:
            return real(self, job)  # type: ignore[arg-type]
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(Transfer, "_move", move)
    hf = save_hf(tmp_path / "hf", distinct_weights())
    for workers, queue, expected in ((4, 2, 2), (3, 50, 3)):
        most = 0
        convert(hf, tmp_path / f"{workers}", format="torch", workers=workers, max_queue_size=queue)
        assert most == expected
