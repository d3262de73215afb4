"""Parts of a large file hold just its documents, numbered as in the whole; processes share them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import division
from data_prep.commands import main
from data_prep.division import divide
from data_prep.inspection import locate
from data_prep.packing import unpack
from data_prep.sequences import SequenceFile, sequence_files
from data_prep.sources import Document, FaultPolicy, Source, read_documents
from data_prep.tokenize_corpus import group_by_size
from data_prep.tokenizer import Tokenizer
from support.tiny_tokenizer import TEXT

lines = st.lists(st.text(max_size=40).map(lambda t: t.encode(errors="ignore").decode()), max_size=30)


def read(source: Source) -> list[Document]:
    return list(read_documents(source.path, FaultPolicy(), None, source.part))


@settings(max_examples=100, deadline=None)
@given(texts=lines, size=st.integers(1, 60), block=st.integers(1, 90), bom=st.booleans(), ended=st.booleans())
def test_parts_of_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, block: int, bom: bool, ended: bool
) -> None:
    """Wherever the parts and the blocks that are read for them end.

    Planted: lines counted from each block's start -> numbers are wrong, fails; a part that ends before its line does
    -> a line is read twice, fails; BOM looked for in every part -> no failure here (no line begins with one).
    """
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n" * (ended and bool(texts))
    path.write_bytes(b"\xef\xbb\xbf" * bom + content.encode())
    source = Source(str(path), "a.jsonl")
    whole = read(source) if texts else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "WORTHWHILE", 0)
        patch.setattr(division, "READ_SIZE", block)
        parts = divide(source, size)
    if texts:
        assert list(chain.from_iterable(read(part) for part, _ in parts)) == whole == list(enumerate(texts))
    assert sum(part_size for _, part_size in parts) == path.stat().st_size
    assert all(part_size >= size for _, part_size in parts[:-1])


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), group=st.integers(1, 9), size=st.integers(1, 600))
def test_parts_of_parquet(tmp_path_factory: pytest.TempPathFactory, count: int, group: int, size: int) -> None:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    texts = [f"text {number} {'x' * (number * 7 % 50)}" for number in range(count)]
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), path, row_group_size=group)
    source = Source(str(path), "a.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "WORTHWHILE", 0)
        parts = divide(source, size)
    assert list(chain.from_iterable(read(part) for part, _ in parts)) == read(source) == list(enumerate(texts))


def test_what_stays_whole(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl.gz", "a.json"):
        (tmp_path / name).write_bytes(b"\n" * 1000)
        source = Source(str(tmp_path / name), name)
        assert divide(source, 10) == [(source, 1000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 1000)
    source = Source(str(tmp_path / "a.jsonl"), "a.jsonl")
    assert divide(source, 63) == [(source, 1000)]
    assert len(divide(source, 62)) == 17
    assert divide(source, 0) == [(source, 1000)]
    # In a small corpus a file of fewer parts is divided, too, if it is a good part of it.
    assert divide(source, 100, corpus_bytes=16_001) == [(source, 1000)]
    assert len(divide(source, 100, corpus_bytes=3_000)) == 10
    assert divide(source, 500, corpus_bytes=1_000) == [(source, 1000)]
    remote = Source((tmp_path / "a.jsonl").as_uri(), "a.jsonl")
    assert divide(remote, 10) == [(remote, 1000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_one_large_file(
    tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Divided among two processes or done by one: the same bytes; each document once; FIM as undivided; it is located.

    Planted: a part's documents numbered from 0 -> other FIM draws than undivided, fails.
    """
    texts = [f"{number}: {(TEXT * 5)[number % 50 :]}"[:1300] for number in range(1100)]
    if name == "a.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=90, use_dictionary=False, compression="none")
    command = ["tokenize", str(tmp_path / name), "--tokenizer", str(tokenizer_file), "--max-seq-length", "512",
               "--fim-rate", "0.5"]  # fmt: skip
    monkeypatch.setattr(division, "WORTHWHILE", 1)
    for processes in ("1", "2"):
        main([*command, "--out", str(tmp_path / processes), "--shard-mb", "1", "--processes", processes])
    main([*command, "--out", str(tmp_path / "whole"), "--shard-mb", "100"])
    one, two, whole = (sequence_files(tmp_path / folder) for folder in ("1", "2", "whole"))
    assert [path.name for path in one] == ["examples_0_0.h5", "examples_0_1.h5"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]

    def documents(files: list[Path]) -> list[list[int]]:
        return [list(d) for path in files for d in unpack(SequenceFile(path).rows(), tokenizer.eos_id)]

    assert documents(one) == documents(whole)
    assert len(documents(one)) == len(texts)
    span, text = locate(tmp_path / "1", len(SequenceFile(one[0])) + 5)[-1]
    assert text == texts[span.document]
    assert span.document > 600


def test_a_small_corpus_is_work_for_several_processes(tmp_path: Path) -> None:
    """By default: three files of 13 MB are about as many shards as megabytes; of 100 bytes they are one.

    Planted: 16 MB whatever the corpus -> three shards for two processes, fails.
    """
    sources = []
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 99 + b"\n")
        sources.append(Source(str(tmp_path / name), name))
    assert list(group_by_size(sources, None)) == [tuple(sources)]
    sources = [source._replace(path=f"{source.path}.jsonl") for source in sources]
    for source in sources:
        Path(source.path).write_bytes((b"x" * 999 + b"\n") * 13_000)
    shards = list(group_by_size(sources, None))
    assert 36 <= len(shards) <= 39
    assert [len(shard) for shard in shards[:5]] == [1] * 5
