"""Where the tensors of a file lie: safetensors and torch.save files described without reading any tensor.

A torch.save file is a zip archive: `data.pkl` pickles the object, with each tensor's values in a record `data/N` of its
own. Here tensors come out of the pickle as `TensorRef`s, and nothing that the pickle names is run.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.window import Window, opened

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER = 100_000_000  # what the safetensors library allows
_DAMAGED = "cannot be read, the file is damaged or cut short: copy it again"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Record:
    """One zip record with a tensor's values. crc_at: where in the file its CRC-32 stands (4 bytes, little endian)."""

    file: Path
    offset: int
    nbytes: int
    crc_at: tuple[int, ...]


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file. offset: bytes from the file's start to its first value; strides: in elements, as torch's.

    dtype: a torch.dtype, or the name of one that this module does not know.
    """

    file: Path
    offset: int
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    record: Record | None = None


def describe_safetensors(file: Path, window: Window | None = None) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file, from its header. Raises InputError for a missing or damaged file.

    window: where the file's bytes are read, if not from `file`.
    """
    try:
        with opened(file) if window is None else nullcontext(window) as source:
            length = int.from_bytes(source.at(0, 8), "little")
            if not 2 <= length <= min(source.size - 8, _MAX_HEADER):
                raise InputError(f"{file}: {_DAMAGED}")
            header = json.loads(source.at(8, length))
            size = source.size
        refs = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
            wrong_size = isinstance(dtype, torch.dtype) and end - start != torch.Size(shape).numel() * dtype.itemsize
            if start < 0 or 8 + length + end > size or wrong_size:
                raise InputError(f"{file}: {_DAMAGED}")
            refs[name] = TensorRef(file, 8 + length + start, dtype, shape, contiguous_strides(shape))
    except OSError as error:
        raise InputError(f"{file}: no such file: the checkpoint is incomplete, copy it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: {_DAMAGED}") from error
    return refs


def describe_torch(file: Path, start: int = 0, length: int | None = None, window: Window | None = None) -> Any:
    """What torch.save wrote, with a `TensorRef` for each tensor. start, length: where in the file it stands (bytes).

    window: where the file's bytes are read, if not from `file`; then the refs' offsets are all 0, because to know them
    takes a read for each tensor. Raises InputError for a missing or damaged file, and for one that needs a class that
    no checkpoint of weights needs.
    """
    try:
        with opened(file, start, length) if window is None else nullcontext(window) as source:
            if start == 0 and length is None and not zipfile.is_zipfile(source):
                if source.size > 2 and source.at(0, 1) == b"\x80":
                    raise InputError(
                        f"{file}: was written by torch before 1.6: load it where you trust it, and save it again"
                    )
                raise InputError(f"{file}: {_DAMAGED}")
            archive = zipfile.ZipFile(io.BufferedReader(source))
            records, pickled = _records(archive, source, file, start, has_offsets=window is None)
            return _Unpickler(pickled, records, file).load()
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file: the checkpoint is incomplete, copy it again") from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file}: {_DAMAGED}") from error


def save_torch(content: Any, file: Path, *, with_values: bool = True) -> None:
    """torch.save, which on a full disk raises OSError. with_values: else tensors' values are left out (zeros)."""
    try:
        with nullcontext() if with_values else torch.serialization.skip_data():
            torch.save(content, file)
    except RuntimeError:
        # torch does not tell what the system said; a write of our own does, as far out as torch wanted to write.
        values = sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor))
        os.truncate(file, max(file.stat().st_size, values))
        with file.open("ab") as stream:
            stream.write(bytes(1 << 16))
            stream.flush()
            os.fsync(stream.fileno())
        raise


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _records(
    archive: zipfile.ZipFile, window: Window, file: Path, start: int, has_offsets: bool
) -> tuple[dict[str, Record], io.BytesIO]:
    """The records by their storage's key, and the pickle. has_offsets: whether the records' places are wanted."""
    records: dict[str, Record] = {}
    pickled = None
    central = archive.start_dir
    for info in archive.infolist():
        inner = info.filename.partition("/")[2]
        if inner.startswith("data/") and not has_offsets and info.compress_type == zipfile.ZIP_STORED:
            records[inner.removeprefix("data/")] = Record(file, 0, info.file_size, ())
            continue
        name_length, extra_length = struct.unpack("<HH", window.at(info.header_offset + 26, 4))
        offset = info.header_offset + 30 + name_length + extra_length
        if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > window.size:
            raise InputError(f"{file}: {_DAMAGED}")
        if inner == "data.pkl":
            content = window.at(offset, info.file_size)
            if info.CRC not in (0, zlib.crc32(content)):  # 0: torch was told to leave it out
                raise InputError(f"{file}: {_DAMAGED}")
            pickled = io.BytesIO(content)
        elif inner == "byteorder" and window.at(offset, info.file_size) != b"little":
            raise InputError(f"{file}: holds big-endian numbers: save it on an ordinary (little-endian) machine")
        elif inner.startswith("data/"):
            crc_at = [start + central + 16]
            if info.flag_bits & 0x08:  # a data descriptor follows the data
                after = offset + info.file_size
                crc_at.append(start + after + (4 if window.at(after, 4) == b"PK\x07\x08" else 0))
            else:
                crc_at.append(start + info.header_offset + 14)
            records[inner.removeprefix("data/")] = Record(file, start + offset, info.file_size, tuple(crc_at))
        central += 46 + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment)
    if pickled is None:
        raise InputError(f"{file}: {_DAMAGED}")
    return records, pickled


class Inert:
    """Stands in for an object of Megatron's in a pickle (an enum, mostly): nothing of it is imported or run."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inert) and self.arguments == other.arguments

    def __hash__(self) -> int:
        return 0


@dataclass(frozen=True)
class _Storage:
    record: Record
    dtype: torch.dtype | None


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    dtype = storage.dtype or next((x for x in rest if isinstance(x, torch.dtype)), torch.uint8)
    shape, strides = tuple(shape), tuple(strides)
    used = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    if min((offset, *shape, *strides), default=0) < 0 or (offset + used) * dtype.itemsize > storage.record.nbytes:
        raise InputError(f"{storage.record.file}: {_DAMAGED}")
    return TensorRef(
        storage.record.file, storage.record.offset + offset * dtype.itemsize, dtype, shape, strides, storage.record
    )


def _rebuild_parameter(tensor: TensorRef, *_: Any) -> TensorRef:
    return tensor


_ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
    "builtins.dict": dict,
    "builtins.set": set,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "_codecs.encode": codecs.encode,
    "_io.BytesIO": io.BytesIO,
    "pathlib.PosixPath": pathlib.PosixPath,
    "pathlib._local.PosixPath": pathlib.PosixPath,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.{core}.multiarray._reconstruct": np.empty(0).__reduce__()[0] for core in ("_core", "core")},
    **{f"numpy.{core}.multiarray.scalar": np.float64(0).__reduce__()[0] for core in ("_core", "core")},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.serialization._get_layout": Inert,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, `args` and `TensorRef`s, and refuses everything else by name."""

    def __init__(self, stream: io.BytesIO, records: dict[str, Record], file: Path) -> None:
        super().__init__(stream)
        self._records, self._file = records, file

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.startswith("megatron."):
            return Inert
        raise InputError(
            f"{self._file}: refused to unpickle class {full}: a checkpoint of weights does not need it; "
            "load the file where you trust it and save its tensors alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(self._records[key], dtype)


def tensor_refs(content: Any) -> Iterator[TensorRef]:
    """All tensors in nested containers."""
    if isinstance(content, TensorRef):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensor_refs(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensor_refs(value)
