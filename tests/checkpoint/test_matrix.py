"""Round trips over every kind of source, format and layout: bit for bit.

The whole matrix is in the slow tier; the default one takes twelve of its cells, among which every two choices meet.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.reference_model import TINY

# Splits over 8 ranks by its heads, and neither by its FFN (2 x 5 x 17) nor by its vocabulary (2 x 125).
ODD = replace(TINY, num_attention_heads=8, ffn_hidden_size=170, vocab_size=250)


class Cell(NamedTuple):
    """One way through the matrix."""

    kind: str
    shards: int
    format: Any
    tp: int
    pp: int


CHOICES = ("bin", "safetensors"), (1, 3), ("torch", "torch_dist", "legacy"), (1, 2, 4, 8), (1, 2, 4)
ALL = [Cell(*choice) for choice in product(*CHOICES)]
SELECTION = [
    Cell("bin", 1, "torch", 1, 1),
    Cell("safetensors", 3, "torch_dist", 1, 2),
    Cell("bin", 3, "legacy", 1, 4),
    Cell("safetensors", 1, "legacy", 2, 1),
    Cell("bin", 3, "torch", 2, 2),
    Cell("bin", 1, "torch_dist", 2, 4),
    Cell("bin", 3, "torch_dist", 4, 1),
    Cell("bin", 1, "legacy", 4, 2),
    Cell("safetensors", 3, "torch", 4, 4),
    Cell("safetensors", 3, "legacy", 8, 1),
    Cell("safetensors", 1, "torch_dist", 8, 2),
    Cell("bin", 1, "torch", 8, 4),
]


def test_every_two_choices_meet_in_the_selection() -> None:
    for first, second in combinations(range(len(CHOICES)), 2):
        met = {(cell[first], cell[second]) for cell in SELECTION}
        assert met == set(product(CHOICES[first], CHOICES[second]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The random model in each kind of Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("sources")
    weights = distinct_weights(ODD)
    return {
        (kind, shards): save_hf(folder / f"{kind}{shards}", weights, ODD, kind=kind, shards=shards)
        for kind, shards in product(*CHOICES[:2])
    }


def _there_and_back(source: Path, cell: Cell, folder: Path, vocab_size: int) -> None:
    convert(source, folder / "m", format=cell.format, tensor_parallel=cell.tp, pipeline_parallel=cell.pp)
    there = open_checkpoint(folder / "m")
    assert (there.format, there.tensor_parallel, there.pipeline_parallel) == cell[2:]
    assert there.config.vocab_size % cell.tp == there.config.ffn_hidden_size % cell.tp == 0
    assert there.config.unpadded.vocab_size == vocab_size
    convert(folder / "m", folder / "back", format="hf")
    assert_same_tensors(folder / "back", open_checkpoint(source).weights)
    assert open_checkpoint(folder / "back").config == open_checkpoint(source).config
    for made in ("m", "back"):
        shutil.rmtree(folder / made)


@pytest.mark.parametrize("cell", SELECTION, ids=str)
def test_selection(tmp_path: Path, sources: dict[tuple[str, int], Path], cell: Cell) -> None:
    _there_and_back(sources[cell[:2]], cell, tmp_path, ODD.vocab_size)
    assert_same_tensors(sources[cell[:2]], distinct_weights(ODD))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shards"), product(*CHOICES[:2]))
def test_whole_matrix(tmp_path: Path, sources: dict[tuple[str, int], Path], kind: str, shards: int) -> None:
    for cell in ALL:
        if cell[:2] == (kind, shards):
            _there_and_back(sources[kind, shards], cell, tmp_path, ODD.vocab_size)


@pytest.mark.slow
def test_whole_matrix_of_the_reference_checkpoint(tmp_path: Path, shared: Path) -> None:
    """Four heads: TP 8 is refused. In one file and in safetensors, it is what the converter made of it."""
    published = shared / "fixtures/hf_tiny"
    weights = open_checkpoint(published).weights
    config = weights.config
    tensors = {name: weights.read(name) for name in weights.names()}
    for cell in ALL:
        source = published
        if cell[:2] != ("bin", 3):
            source = tmp_path / f"{cell.kind}{cell.shards}"
            if not source.exists():
                save_hf(source, tensors, config, kind=cell.kind, shards=cell.shards)  # type: ignore[arg-type]
        if cell.tp == 8:
            with pytest.raises(InputError, match="8 does not divide the attention heads"):
                convert(source, tmp_path / "m", format=cell.format, tensor_parallel=8, pipeline_parallel=cell.pp)
        else:
            _there_and_back(source, cell, tmp_path, config.vocab_size)
