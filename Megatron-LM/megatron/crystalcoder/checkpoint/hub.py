"""A Hugging Face checkpoint on the hub as a source: `owner/name` or `owner/name@revision`.

`huggingface_hub` fetches the files of weights one after the other into its cache (`HF_HOME`), where a transfer that
broke is taken up; each is converted while the next is on its way. What a target looks like is known before, from the
files' headers, which are read by themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.download import told_in_one_line
from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.blocks import Stored
from megatron.crystalcoder.checkpoint.companions import COMPANIONS
from megatron.crystalcoder.checkpoint.directory import Interrupted
from megatron.crystalcoder.checkpoint.hf_reader import HEAD, describe_file, open_hf
from megatron.crystalcoder.checkpoint.open import Checkpoint, open_checkpoint
from megatron.crystalcoder.checkpoint.placement import BlockWeights
from megatron.crystalcoder.checkpoint.tensor_files import TensorRef
from megatron.crystalcoder.checkpoint.window import Window

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_READ_AHEAD = 1 << 20


def open_source(name: str | Path, *, true_vocab_size: int | None = None, iteration: int | None = None) -> Checkpoint:
    """Open a checkpoint directory or, if there is none of this name, a model on the hub. Raises InputError.

    true_vocab_size, iteration: see `open_checkpoint`.
    """
    match = _NAME.fullmatch(str(name))
    if match is None or Path(name).exists():
        return open_checkpoint(name, true_vocab_size=true_vocab_size, iteration=iteration)
    if iteration is not None:
        raise InputError(f"{name}: there is no such directory, and a model on the hub has no iterations: correct it")
    hub = _Hub(match["repository"], match["revision"] or "main")
    try:
        folder, sizes = hub.fetch_companions()
    except InputError as error:
        raise InputError(f"{name}: no such directory, and not to be had from the hub: {error}") from error
    weights = _HubWeights(hub, folder, sizes)
    if true_vocab_size not in (None, weights.config.vocab_size):
        raise InputError(
            f"{name}: the vocabulary has {weights.config.vocab_size} rows, not the {true_vocab_size} of "
            "--true-vocab-size: drop the flag"
        )
    return Checkpoint(folder, folder, "hf", weights.config, weights, hf_files=folder, is_remote=True)


class _Hub:
    """One revision of a model repository."""

    def __init__(self, repository: str, revision: str) -> None:
        self.repository, self._revision, self._commit = repository, revision, revision
        self._endpoint = os.environ.get("HF_ENDPOINT") or None

    def fetch_companions(self) -> tuple[Path, dict[str, int]]:
        """Fetch what is not weights; the folder of the cache for this revision, and all files with their sizes."""
        with self.errors():
            from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # the conversion has one
            at: dict[str, Any] = {"revision": self._revision, "endpoint": self._endpoint}
            if constants.HF_HUB_OFFLINE:  # what the cache holds
                config = try_to_load_from_cache(self.repository, "config.json", revision=self._revision)
                if not isinstance(config, str):
                    raise InputError(f"{self.repository}: is not in the cache, and HF_HUB_OFFLINE is set")
                folder = Path(config).parent
                sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            else:
                folder = Path(snapshot_download(self.repository, allow_patterns=[*COMPANIONS, "*.index.json"], **at))
                info = HfApi(endpoint=self._endpoint).model_info(
                    self.repository, revision=folder.name, files_metadata=True
                )
                sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
            self._commit = folder.name
        return folder, sizes

    def fetch(self, name: str) -> None:
        """Bring one file into the cache; what is there of it already is not transferred again."""
        with self.errors():
            from huggingface_hub import hf_hub_download

            hf_hub_download(self.repository, name, revision=self._commit, endpoint=self._endpoint)

    def window(self, name: str, size: int) -> Window:
        """A file's bytes, read from the hub where they are wanted."""
        return _RemoteWindow(self, name, size)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file."""
        with self.errors():
            from huggingface_hub import hf_hub_url
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            url = hf_hub_url(self.repository, name, revision=self._commit, endpoint=self._endpoint)
            headers = build_hf_headers() | {"Range": f"bytes={start}-{start + length - 1}"}
            answer = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            if answer.status_code != 206:
                raise OSError(f"{name}: the hub does not send parts of a file")
            return bytes(answer.content)

    def errors(self) -> AbstractContextManager[None]:
        """Say in one line what the library's exceptions mean."""
        return told_in_one_line(self.repository, self._revision, f"https://huggingface.co/{self.repository}")


class _RemoteWindow(Window):
    """A file on the hub. Small reads are widened and kept: headers are read in many of them."""

    def __init__(self, hub: _Hub, name: str, size: int) -> None:
        super().__init__()
        self._hub, self._name, self.size = hub, name, size
        self._parts: dict[int, bytes] = {}

    def at(self, offset: int, length: int) -> bytes:
        stop, data = min(offset + length, self.size), b""
        while offset < stop:
            part, within = divmod(offset, _READ_AHEAD)
            if part not in self._parts:
                first = part * _READ_AHEAD
                wanted = min(_READ_AHEAD, self.size - first)
                self._parts[part] = self._hub.read(self._name, first, wanted)
            piece = self._parts[part][within : within + stop - offset]
            if not piece:
                break
            data, offset = data + piece, offset + len(piece)
        return data


class _HubWeights(BlockWeights):
    """Weights whose files arrive one after the other, from the first time that one is wanted."""

    def __init__(self, hub: _Hub, folder: Path, sizes: dict[str, int]) -> None:
        self._hub, self._sizes = hub, sizes
        self._arrived: dict[Path, Future[dict[str, TensorRef]]] = {}
        self._lock = threading.Lock()
        weights = open_hf(folder, self._describe, lambda file: file.name in sizes)
        super().__init__(weights.config, weights.stored)
        files = sorted({block.file for stored in self.stored.values() for copy in stored.copies for block in copy})
        self._order = {file: number for number, file in enumerate(files, start=1)}
        self._refuse_full_disk(folder)

    def locate(self, name: str) -> Stored:
        """Wait for the files that hold it. Raises InputError, or Interrupted when the connection is lost."""
        self._start()
        stored = self.stored[name]
        copies = []
        for (block,), copy_of in zip(stored.copies, (name, HEAD), strict=False):
            ref = self._arrived[block.file].result().get(copy_of)
            if ref is None or (ref.dtype, ref.shape) != (stored.dtype, stored.shape):
                raise InputError(f"{block.file}: tensor {copy_of} is not what its header says: delete the file")
            copies.append([replace(block, offset=ref.offset)])
        return replace(stored, copies=copies)

    def arrival(self, name: str) -> int:
        return max(self._order[block.file] for (block,) in self.stored[name].copies)

    def abandon(self) -> None:
        self._end(Interrupted("the transfer was abandoned"))

    def _describe(self, file: Path) -> dict[str, TensorRef]:
        if file.is_file():
            return describe_file(file)
        if file.name not in self._sizes:
            raise InputError(f"{self._hub.repository}: the index names {file.name}, which is not there")
        return describe_file(file, self._hub.window(file.name, self._sizes[file.name]))

    def _refuse_full_disk(self, folder: Path) -> None:
        missing = sum(self._sizes[file.name] for file in self._order if not file.is_file())
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise InputError(
                f"{self._hub.repository}: {missing / 1e9:,.1f} GB are to come and {free / 1e9:,.1f} GB are free in the "
                "cache: make room, or point HF_HOME to a larger disk"
            )

    def _start(self) -> None:
        with self._lock:
            if self._arrived:
                return
            self._arrived = {file: Future() for file in self._order}
            # A daemon: an interrupted command does not wait for the transfer of a file.
            threading.Thread(target=self._fetch_all, name="download", daemon=True).start()

    def _fetch_all(self) -> None:
        for file, future in self._arrived.items():
            try:
                if not file.is_file():
                    self._hub.fetch(file.name)
                refs = describe_file(file)
            except InputError as error:
                # A file that is not there was not sent whole, whatever the reason.
                self._end(error if file.is_file() else Interrupted(f"{error} (the target goes on from here, too)"))
                return
            except BaseException as error:  # noqa: BLE001 - raised where the file is waited for
                self._end(error)
                return
            with self._lock:
                if future.done():
                    return
                self.records += [ref.record for ref in refs.values() if ref.record is not None]
                future.set_result(refs)

    def _end(self, error: BaseException) -> None:
        """Nothing more arrives: tell those who wait."""
        with self._lock:
            for future in self._arrived.values():
                if not future.done():
                    future.set_exception(error)
