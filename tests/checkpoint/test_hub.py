"""A model on the hub as a source, against a server on this machine that speaks the hub's API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint import blocks
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.hub import open_source
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.hub_server import COMMIT, Hub, serve
from tools import convert as command

REPOSITORY, REVISION = "LLM360/CrystalCoder", "CrystalCoder_phase2_checkpoint_214387"
NAME = f"{REPOSITORY}@{REVISION}"
LAST = "pytorch_model-00003-of-00003.bin"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Three `.bin` shards; the head, a copy of the embedding in the first, is in the last."""
    weights = distinct_weights()
    head = {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    hf = save_hf(tmp_path / "source", weights | head)
    (hf / "tokenizer.json").write_text("{}")
    (hf / "training_log.txt").write_text("of no use")
    with serve(Hub(REPOSITORY, _files(hf), kind="models", revisions=("main", REVISION))) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        # `make test` keeps every test off the real hub; this one is on the loopback.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def _whole(hub: Hub) -> list[str]:
    """Files of weights that were sent from the start or to the end, not parts for a header."""
    return [name for name, given, _ in hub.transfers if "model" in name and (not given or given.endswith("-"))]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
def test_a_revision_is_converted(tmp_path: Path, hub: Hub, format_: str) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--from", NAME, "--to", str(tmp_path / "m"), "--format", format_, "--tp", "2"])
    assert stop.value.code == 0
    assert_same_tensors(tmp_path / "m", distinct_weights())
    assert (tmp_path / "m/hf/tokenizer.json").read_text() == "{}"
    shards = [f"pytorch_model-0000{shard}-of-00003.bin" for shard in (1, 2, 3)]
    assert [name for name in _whole(hub) if name.endswith(".bin")] == shards
    assert "training_log.txt" not in {name for name, _, _ in hub.transfers}


def test_safetensors_in_one_file(tmp_path: Path, hub: Hub) -> None:
    convert(tmp_path / "source", tmp_path / "one", format="hf", verify=False)
    hub.files |= _files(tmp_path / "one")
    convert(REPOSITORY, tmp_path / "m", format="torch", pipeline_parallel=2)
    assert_same_tensors(tmp_path / "m", distinct_weights())
    assert _whole(hub) == ["pytorch_model.bin.index.json", "model.safetensors"]


def test_a_shard_is_converted_while_the_next_is_on_its_way(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard is held back until a tensor has been written, for 10 s at most."""
    written = hub.held[LAST] = threading.Event()
    real = blocks.Files.write
    before_the_last: list[bool] = []

    def write(self: blocks.Files, file: Path, offset: int, data: np.ndarray) -> None:
        before_the_last.append(LAST not in _whole(hub))
        real(self, file, offset, data)
        written.set()

    monkeypatch.setattr(blocks.Files, "write", write)
    convert(NAME, tmp_path / "m", format="torch", workers=1)
    assert before_the_last[0]
    assert_same_tensors(tmp_path / "m", distinct_weights())


def test_headers_alone_tell_what_it_is(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["inspect", NAME])
    shown = capsys.readouterr().out
    assert ["transformer.wte.weight", "[256,", "64]", "float32"] in [line.split() for line in shown.splitlines()]
    assert [name for name in _whole(hub) if name.endswith(".bin")] == []


def test_diff_with_a_copy_of_it(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["diff", NAME, str(tmp_path / "source")])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("equal, bit for bit: 59 tensors")


def test_a_broken_transfer_is_taken_up(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.break_after[LAST] = 100_000
    convert(NAME, tmp_path / "m", format="torch")
    assert_same_tensors(tmp_path / "m", distinct_weights())
    sent = [(given, size) for name, given, size in hub.transfers if name == LAST and (not given or given[-1] == "-")]
    assert sent == [("", 100_000), ("bytes=100000-", len(hub.files[LAST]) - 100_000)]


def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub fails at the last shard: what is there of the target and of the source is not made again."""
    hub.refused.add(LAST)
    arguments = ("--from", NAME, "--to", tmp_path / "m", "--format", "torch", "--workers", 1)
    error = _refused(capsys, *arguments)
    assert "the hub answers 500: run the same command again when it is back" in error
    assert not (tmp_path / "m").exists()
    assert (tmp_path / ".m.partial/conversion.json").is_file()
    hub.refused.clear()
    hub.transfers.clear()
    writes = 0
    real = blocks.Files.write

    def write(self: blocks.Files, file: Path, offset: int, data: np.ndarray) -> None:
        nonlocal writes
        writes += 1
        real(self, file, offset, data)

    monkeypatch.setattr(blocks.Files, "write", write)
    convert(NAME, tmp_path / "m", format="torch", workers=1)
    assert_same_tensors(tmp_path / "m", distinct_weights())
    assert [name for name in _whole(hub) if name.endswith(".bin")] == [LAST]
    rest = writes
    convert(NAME, tmp_path / "again", format="torch", workers=1)
    assert 0 < rest < (writes - rest) * 0.7


def test_what_cannot_be_had(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("--to", tmp_path / "m", "--tp", 2)
    error = _refused(capsys, "--from", f"{REPOSITORY}@nothing", *to)
    assert "LLM360/CrystalCoder: has no revision 'nothing'" in error
    error = _refused(capsys, "--from", "LLM360/nothing", *to)
    assert "LLM360/nothing: no such directory, and not to be had from the hub" in error
    error = _refused(capsys, "--from", tmp_path / "nothing", *to)
    assert "nothing: no such directory: give the directory" in error
    shard = hub.files.pop(LAST)
    assert f"the index names {LAST}, which is not there" in _refused(capsys, "--from", NAME, *to)
    hub.files[LAST] = shard[: len(shard) // 2]
    assert f"{LAST}: cannot be read, the file is damaged or cut short" in _refused(capsys, "--from", NAME, *to)
    hub.files[LAST] = shard
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "are free in the cache: make room, or point HF_HOME" in _refused(capsys, "--from", NAME, *to)
    assert not (tmp_path / "m").exists()


def test_offline_the_cache_serves(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_source(NAME).path.name == COMMIT
    convert(NAME, tmp_path / "m", format="torch")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.transfers.clear()
    convert(NAME, tmp_path / "offline", format="torch")
    assert_same_tensors(tmp_path / "offline", distinct_weights())
    assert hub.transfers == []
    with pytest.raises(InputError, match=r"other/model: no such directory, and not to be had from the hub: .*OFFLINE"):
        open_source("other/model")
