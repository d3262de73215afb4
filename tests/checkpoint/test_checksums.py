"""Bits of a source that have changed since it was written: told by the checksums of its zip files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from support.checkpoints import assert_same_tensors, distinct_weights, save_hf
from support.reference_model import TINY

# Padded at TP 4, so that some of a file's values are no tensor's own.
ODD = replace(TINY, ffn_hidden_size=170, vocab_size=250)
NAMES = ("transformer.wte.weight", "transformer.h.1.attn.c_attn.bias", "transformer.h.3.mlp.c_proj.weight")


@pytest.fixture
def without_checksums() -> Iterator[None]:
    """torch.save as someone in a hurry sets it."""
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def _flip(path: Path, name: str) -> Path:
    """Change the lowest bit of a number of the tensor; the file that holds it."""
    block = open_checkpoint(path).weights.stored[name].copies[0][-1]
    with block.file.open("r+b") as stream:
        stream.seek(block.offset + 8)
        byte = stream.read(1)[0]
        stream.seek(block.offset + 8)
        stream.write(bytes([byte ^ 1]))
    return block.file


@pytest.mark.parametrize("format_", ["bin", "torch", "legacy", "torch_dist"])
@pytest.mark.parametrize("name", NAMES)
def test_one_bit_is_noticed(tmp_path: Path, format_: Any, name: str) -> None:
    source = save_hf(tmp_path / "bin", distinct_weights(ODD), ODD)
    if format_ != "bin":
        convert(source, tmp_path / format_, format=format_, tensor_parallel=4, logits=False)
        source = tmp_path / format_
    convert(source, tmp_path / "good", format="torch", tensor_parallel=2, logits=False)
    file = _flip(source, name)
    with pytest.raises(InputError, match=rf"{file.name}: tensor {name} is damaged \(its checksum is another\)"):
        convert(source, tmp_path / "out", format="torch", tensor_parallel=2, logits=False)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", format="torch", verify=False)


def test_padding_counts_too(tmp_path: Path) -> None:
    """A row that pads the vocabulary belongs to no tensor, but to the record that the checksum is of."""
    hf = save_hf(tmp_path / "hf", distinct_weights(ODD), ODD)
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=4, logits=False)
    stored = open_checkpoint(tmp_path / "m").weights.stored["transformer.wte.weight"]
    block = stored.copies[0][-1]
    with block.file.open("r+b") as stream:
        stream.seek(block.offset + (block.rows[1] - block.rows[0]) * block.pitch * 4)
        stream.write(b"\1")
    with pytest.raises(InputError, match=r"transformer\.wte\.weight is damaged"):
        convert(tmp_path / "m", tmp_path / "back", format="hf")


def test_a_damaged_pickle_is_noticed(tmp_path: Path) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights(), shards=1)
    file = hf / "pytorch_model.bin"
    content = file.read_bytes()
    assert content.count(b"transformer.h.2.ln_1.bias") == 1
    file.write_bytes(content.replace(b"transformer.h.2.ln_1.bias", b"transformer.h.2.ln_1.bibs"))
    with pytest.raises(InputError, match="damaged or cut short"):
        open_checkpoint(hf)


def test_files_without_checksums(tmp_path: Path, without_checksums: None) -> None:
    weights = distinct_weights()
    hf = save_hf(tmp_path / "hf", weights)
    convert(hf, tmp_path / "m", format="torch")
    assert_same_tensors(tmp_path / "m", weights)


def test_tensors_that_share_their_storage(tmp_path: Path) -> None:
    """A tied head saved from a live model: two names, one record; and two tensors in parts of one storage."""
    weights = distinct_weights()
    one = torch.cat([weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]])
    shared = weights | {
        "lm_head.weight": weights["transformer.wte.weight"],
        "transformer.ln_f.weight": one[: TINY.hidden_size],
        "transformer.ln_f.bias": one[TINY.hidden_size :],
    }
    hf = save_hf(tmp_path / "hf", shared, shards=1)
    convert(hf, tmp_path / "m", format="torch")
    assert_same_tensors(tmp_path / "m", weights)
    _flip(hf, "transformer.ln_f.bias")
    with pytest.raises(InputError, match=r"tensor transformer\.ln_f\.(weight|bias) is damaged"):
        convert(hf, tmp_path / "out", format="torch")
