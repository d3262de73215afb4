"""Checksums of records written in parts, and of whole files: what `unzip -t` looks at."""

from __future__ import annotations

import random
import zipfile
import zlib
from pathlib import Path

import pytest

from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.crc import Part, combined_crc, crc32
from megatron.crystalcoder.checkpoint.tensor_files import Record
from support.checkpoints import distinct_weights, save_hf


def test_parts_in_any_order_with_zeros_between_them() -> None:
    """Against zlib over the whole. Planted: the gap before a part not fed in, 224 of 300 differ."""
    chance = random.Random(7)
    for _ in range(300):
        size = chance.randrange(1, 5000)
        data, content = chance.randbytes(size), bytearray(size)
        cuts = sorted(chance.sample(range(size + 1), min(size + 1, chance.choice((0, 2, 4, 6))) // 2 * 2))
        parts = []
        for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
            content[start:stop] = data[start:stop]
            parts.append(Part(100 + start, stop - start, crc32(data[start:stop])))
        chance.shuffle(parts)
        assert combined_crc(Record(Path(), 100, size, ()), parts) == zlib.crc32(content)


@pytest.mark.parametrize(("format_", "tp", "pp"), [("torch", 2, 2), ("legacy", 4, 1)])
def test_rank_files_pass_a_zip_test(tmp_path: Path, format_: str, tp: int, pp: int) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    convert(hf, tmp_path / "m", format=format_, tensor_parallel=tp, pipeline_parallel=pp)
    files = list((tmp_path / "m").rglob("*.pt"))
    assert len(files) == tp * pp
    for file in files:
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None


def test_torch_dist_tensors_pass_a_zip_test(tmp_path: Path) -> None:
    """Each tensor in a .distcp file is a zip file of its own."""
    from megatron.crystalcoder.checkpoint.torch_dist_reader import read_metadata

    convert(save_hf(tmp_path / "hf", distinct_weights()), tmp_path / "m", format="torch_dist")
    folder = tmp_path / "m/iter_0000001"
    for info in read_metadata(folder).storage_data.values():
        (tmp_path / "one").write_bytes((folder / info.relative_path).read_bytes()[info.offset :][: info.length])
        with zipfile.ZipFile(tmp_path / "one") as archive:
            assert archive.testzip() is None
