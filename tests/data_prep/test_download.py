"""`data download` against a server on this machine that speaks the hub's API."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.commands import Corpus, main
from data_prep.download import CORPORA
from data_prep.errors import InputError
from support.hub_server import Hub, serve

NOISE = np.random.default_rng(0).bytes(3_000_000)
FILES = {
    "README.md": b"# data\n",
    "python/train-00000.parquet": NOISE,
    "python/train-00001.parquet": NOISE[:1000],
    "css/train-00000.parquet": NOISE[:500],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(Hub(CORPORA["starcoderdata"], dict(FILES))) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        # `make test` keeps every test off the real hub; this one is on the loopback.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield served


def fetch(out: Path, *more: str) -> None:
    main(["download", "starcoderdata", "--out", str(out), *more])


def fetched(out: Path) -> dict[str, bytes]:
    paths = (p.relative_to(out) for p in out.rglob("*") if p.is_file())
    return {p.as_posix(): (out / p).read_bytes() for p in paths if p.parts[0] != ".cache"}


def test_commands_know_the_corpora() -> None:
    assert [corpus.value for corpus in Corpus] == list(CORPORA)


def test_everything_and_again(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / "out")
    assert fetched(tmp_path / "out") == FILES
    assert sorted(name for name, _, _ in hub.transfers) == sorted(FILES)
    (tmp_path / "out/css/train-00000.parquet").unlink()
    hub.transfers.clear()
    fetch(tmp_path / "out")  # only what is missing
    assert fetched(tmp_path / "out") == FILES
    assert [name for name, _, _ in hub.transfers] == ["css/train-00000.parquet"]


def test_include(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / "out", "--include", "css/*", "--include", "*.md")
    assert sorted(fetched(tmp_path / "out")) == ["README.md", "css/train-00000.parquet"]
    with pytest.raises(InputError, match=r"--include 'pyhton/\*': matches no file of .*; it has README.md, css/, pyth"):
        fetch(tmp_path / "none", "--include", "css/*", "--include", "pyhton/*")
    assert not (tmp_path / "none").exists()


def test_broken_transfer_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends after 1 MB: the rest is asked for with Range (the library keeps whole chunks, of 10 MB)."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    big = "python/train-00000.parquet"
    hub.break_after[big] = 1_000_000
    fetch(tmp_path / "out", "--include", "python/*")
    assert fetched(tmp_path / "out")[big] == NOISE
    sent = [(given, size) for name, given, size in hub.transfers if name == big]
    assert sent == [("", 1_000_000), ("bytes=1000000-", 2_000_000)]


def test_relaunch_after_a_failure(hub: Hub, tmp_path: Path) -> None:
    big = "python/train-00000.parquet"
    hub.refused.add(big)
    with pytest.raises(InputError, match=r"starcoderdata: the hub answers 500: run the same command again"):
        fetch(tmp_path / "out")
    assert big not in fetched(tmp_path / "out")
    arrived = set(fetched(tmp_path / "out"))
    hub.refused.clear()
    hub.transfers.clear()
    fetch(tmp_path / "out")
    assert fetched(tmp_path / "out") == FILES
    assert not arrived.intersection(name for name, _, _ in hub.transfers)


def test_checksum(hub: Hub, tmp_path: Path) -> None:
    """Content of the right size that is not the hub's.

    Planted: no verify_repo_checksums -> nothing is said, fails.
    """
    name = "css/train-00000.parquet"
    hub.swapped[name] = bytes(500)
    with pytest.raises(InputError, match=rf"{name}: differs from the hub's checksum: delete it and run again"):
        fetch(tmp_path / "out")
    hub.swapped.clear()
    (tmp_path / "out" / name).unlink()
    fetch(tmp_path / "out")
    assert fetched(tmp_path / "out") == FILES


def test_gated(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"starcoderdata: is gated .* accept its terms at https:.*set HF_TOKEN"):
        fetch(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch(tmp_path / "out", "--include", "css/")
    assert list(fetched(tmp_path / "out")) == ["css/train-00000.parquet"]


def test_no_space_and_no_revision(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has no revision 'v9'"):
        fetch(tmp_path / "out", "--revision", "v9")
    monkeypatch.setattr("data_prep.download.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(InputError, match=r"0\.0 GB are to come and 0\.0 GB are free"):
        fetch(tmp_path / "out")


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_offline_is_one_line(tmp_path: Path, repo_root: Path, more: dict[str, str]) -> None:
    """Through the real command: nothing listens at the hub's address, or the library is told to be offline."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", **more}
    command = [sys.executable, "-m", "tools.cli", "data", "download", "slimpajama", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cerebras/SlimPajama-627B: ")
    assert line.endswith("run the same command again when it is back; what has arrived stays")
    assert not (tmp_path / "out").exists()
