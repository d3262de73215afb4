"""Which files a data set is made of, and how often each is seen: from the command line, or a YAML recipe.

    sources:
      - {path: chats.jsonl, epochs: 2}
      - {path: code/, system: "You write code."}
      - {path: books.parquet, text: markdown}

or shares of the whole, for all of them, instead of epochs:

    sources:
      - {path: chats.jsonl, weight: 0.7}
      - {path: code_alpaca.json, weight: 0.3}

Paths are relative to the recipe, or to a folder given. `recipes/` beside this file holds some that need no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.errors import InputError

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class SourceSettings:
    """A file or folder; how often its examples are seen (2.5: each twice, half of them a third time), or its weight
    among all sources; the system prompt of its conversations that have none (None: the common one); and the field that
    holds a plain text."""

    path: Path
    epochs: float = 1.0
    weight: float | None = None
    system: str | None = None
    text: str = "text"


def parse_source(text: str) -> SourceSettings:
    """`PATH` or `PATH@EPOCHS`."""
    path, at, epochs = text.rpartition("@")
    if at and not Path(text).exists():
        try:
            return SourceSettings(Path(path), epochs=_positive(float(epochs), f"{text}: the number behind @"))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
    return SourceSettings(Path(text))


def read_recipe(given: str | Path, root: Path | None = None) -> list[SourceSettings]:
    """The sources of a YAML recipe: a file, or the name of one in `recipes/`.

    root: the folder that paths are relative to; None is that of the file, and for a name the working directory.

    Raises:
        InputError: there is none, or an entry of it is wrong; it is named.
    """
    from data_prep.build import find_recipe

    path = find_recipe(str(given), RECIPES)
    root = root or (Path() if path.parent == RECIPES else path.parent)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())}): repair it") from None
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or content.keys() != {"sources"}:
        raise InputError(f"{path}: a recipe is a mapping with one key, sources: a list of entries with a path")
    sources = [_source(entry, f"{path}: sources[{number}]", root) for number, entry in enumerate(entries)]
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise InputError(f"{path}: sources[{weighted.index(False)}] has no weight, others have: give all one, or none")
    return sources


def _source(entry: Any, place: str, base: Path) -> SourceSettings:
    known = {"path", "epochs", "weight", "system", "text"}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or entry.keys() - known:
        raise InputError(f"{place}: an entry has a path, and may have epochs or weight, system, text; nothing else")
    if "epochs" in entry and "weight" in entry:
        raise InputError(f"{place}: has epochs and weight: give one of them")
    for key in ("system", "text"):
        if not isinstance(entry.get(key, ""), str):
            raise InputError(f"{place}: {key} must be text")
    return SourceSettings(
        base / entry["path"],
        epochs=_positive(entry.get("epochs", 1.0), f"{place}: epochs"),
        weight=_positive(entry["weight"], f"{place}: weight") if "weight" in entry else None,
        system=entry.get("system"),
        text=entry.get("text", "text"),
    )


def _positive(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{what} must be a number above 0, not {value!r}")
    return float(value)


def epochs_of(sources: Sequence[SourceSettings], tokens: Sequence[int]) -> list[float]:
    """How often each source is seen. Weights are shares of all tokens: the source that has most tokens for its weight
    is seen once, the others as often as their shares then need. So nothing is left out."""
    if not sources or sources[0].weight is None:
        return [source.epochs for source in sources]
    weights = np.array([source.weight for source in sources], float)
    sizes = np.array(tokens, float)
    total = np.max(np.divide(sizes, weights, out=np.zeros_like(sizes), where=sizes > 0))
    wanted = np.divide(total * weights, sizes, out=np.ones_like(sizes), where=sizes > 0)
    return [float(epochs) for epochs in wanted]


def repeated(count: int, epochs: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers 0 .. count-1, each floor(epochs) times, and a random share of them once more."""
    whole = int(epochs)
    extra = round((epochs - whole) * count)
    parts = [np.tile(np.arange(count), whole), np.sort(rng.permutation(count)[:extra])]
    return np.concatenate(parts)
