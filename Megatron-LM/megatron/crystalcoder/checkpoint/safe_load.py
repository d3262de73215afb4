"""Read torch.save files without running anything that is in them, and without reading more than is asked for."""

from __future__ import annotations

import argparse
import enum
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.tensor_files import Inert


class ModelType(enum.Enum):
    """Stands in for megatron.core.enums.ModelType, which the reference pickles into `args`."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2


_rebuild_array = np.empty(0).__reduce__()[0]

# Beyond tensors and containers, what Megatron checkpoints hold: `args`, and numpy's random state. Importing
# megatron.core for an enum would cost seconds and ask for a GPU, hence the stand-in.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (ModelType, "megatron.core.enums.ModelType"),
    (ModelType, "megatron.model.enums.ModelType"),
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.uint32, np.int64, np.float64)),
    # What arrays are rebuilt with; numpy 2 moved the module.
    *((_rebuild_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
]


def load(path: Path) -> Any:
    """Load a torch.save file on the CPU with torch's restricted unpickler.

    Tensors are mapped from the file: one that nobody touches is never read. Let go of the result to unmap it. Raises
    InputError for a missing or damaged file, and for one that wants to build an object of a class not known to be safe.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file: the checkpoint is incomplete, copy it again")
    is_zip = zipfile.is_zipfile(path)  # torch before 1.6 wrote no zip files; those cannot be mapped
    try:
        return _load(path, is_zip)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        known = {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in _ALLOWED}
        foreign = [name for name in foreign if name not in known]
        if foreign and all(name.startswith("megatron.") for name in foreign):
            # Objects of Megatron's (enums in `args`, mostly) are known by name once one has been seen.
            _ALLOWED.extend((Inert, name) for name in foreign)
            return load(path)
        if foreign:
            name = next(name for name in foreign if not name.startswith("megatron."))
            raise InputError(
                f"{path}: refused to unpickle class {name}: a checkpoint of weights does not need it; "
                "load the file where you trust it and save its tensors alone"
            ) from error
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            what = str(error).split("GLOBAL ", 1)[-1].split()[0]
            raise InputError(f"{path}: refused to unpickle {what}: not part of a checkpoint of weights") from error
        raise InputError(f"{path}: cannot be read, the file is damaged or cut short: copy it again") from error


def _load(path: Path, is_zip: bool) -> Any:
    # Leaving the context forgets what it was given, so what megatron.core has registered for good must not be in it.
    registered = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([item for item in _ALLOWED if item not in registered]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
