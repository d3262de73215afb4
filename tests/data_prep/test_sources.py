"""Readers: every format gives the same documents; every bad record is named with file and place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from data_prep.sources import FaultPolicy, discover, read_documents

TEXTS = ["def f():\n    return 1\n", "naïve 日本 🙂 \u2028 \x00 </s>", "", "x" * 100_000, 'a/b\\c"d"\r\n']


def write(path: Path, content: bytes) -> Path:
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):  # several frames, as `cat a.zst b.zst` gives
        half = len(content) // 2
        content = b"".join(zstandard.compress(part) for part in (content[:half], b"", content[half:]))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst", "lines.json"]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_formats(tmp_path: Path, name: str, ascii_only: bool) -> None:
    records = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    if ".jsonl" in name or name == "lines.json":
        content = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in records)
    else:
        content = json.dumps(records, ensure_ascii=ascii_only, indent=1)
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert list(read_documents(path, FaultPolicy())) == list(enumerate(TEXTS))


@pytest.mark.parametrize("column", ["text", "content"])
def test_parquet(tmp_path: Path, column: str) -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), column: TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(read_documents(tmp_path / "a.parquet", FaultPolicy())) == list(enumerate(TEXTS))
    with pytest.raises(InputError, match="no column 'body' but id"):
        list(read_documents(tmp_path / "a.parquet", FaultPolicy(), "body"))


def test_text_files_and_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\nline".encode())
    (tmp_path / "b.py").write_text("import this\n")
    (tmp_path / "c.jsonl").write_text('"bare string"\n{"text": ["part", "part"]}\n{"text": "NaN", "n": NaN}\n')
    assert [source.name for source in discover([tmp_path])] == ["a.txt", "c.jsonl"]
    sources = discover([tmp_path], [".py"])
    assert [source.name for source in sources] == ["a.txt", "b.py", "c.jsonl"]
    texts = [[d.text for d in read_documents(source.path, FaultPolicy())] for source in sources]
    assert texts == [["line\r\nline"], ["import this\n"], ["bare string", "part\n\npart", "NaN"]]


def test_order_is_by_name(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.txt", "c.parquet", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [source.name for source in discover([tmp_path])]
    assert names == ["a.txt", "b/10.jsonl", "b/2.jsonl", "c.parquet"]
    two = discover([tmp_path / "b", tmp_path / "a.txt"])
    assert [source.name for source in two] == ["0/10.jsonl", "0/2.jsonl", "1/a.txt"]
    with pytest.raises(InputError, match="nowhere: no such"):
        discover([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file that ends in"):
        discover([tmp_path / "empty"])


BAD_LINES = {
    b"": "blank line",
    b"{": "is not JSON",
    b'{"text": "a}': "is not JSON",
    b'{"text": "\xff"}': "is not UTF-8",
    b'{"text": null}': "'text' is null, not text",
    b'{"text": 3}': "'text' is a number, not text",
    b'{"text": {"a": 1}}': "'text' is an object, not text",
    b'{"body": "a"}': "has no key 'text'",
    rb'{"text": "a\ud800"}': r"half of a surrogate pair \(character 2\)",
    b"[1]": "the record is a list",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, bad: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + bad + b'\n{"text": "three"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{BAD_LINES[bad]}.*--on-error skip"):
        list(read_documents(path, FaultPolicy()))
    faults = FaultPolicy("skip")
    assert [d.text for d in read_documents(path, faults)] == ["one", "three"]
    assert [(fault.path, fault.place) for fault in faults.faults] == [(str(path), "2")]


def test_poison_of_the_reference(shared: Path) -> None:
    """Each file that kills the reference without a place is refused at line 2, or is no error."""
    for path in sorted((shared / "fixtures/data/input/poison").glob("*.jsonl")):
        if path.stem in ("bom", "empty", "nul_only"):  # odd texts, but texts
            list(read_documents(path, FaultPolicy()))
        else:
            with pytest.raises(InputError, match=rf"{path.name}:2: "):
                list(read_documents(path, FaultPolicy()))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Planted: zstandard's own stream_reader for .zst -> the cut-off text passes for a short one (no error), and of the
    cut-off lines the last is blamed instead of the file; what follows an array's end not looked at: all fail."""
    lines = b"".join(json.dumps({"text": str(n) * 99}).encode() + b"\n" for n in range(5000))
    for name, count in (("a.jsonl.gz", 5000), ("a.jsonl.zst", 5000), ("b.txt.zst", 1)):
        path = write(tmp_path / name, lines)
        assert len(list(read_documents(path, FaultPolicy()))) == count
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=f"{name}: damaged or cut off"):
            list(read_documents(path, FaultPolicy()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": ')
    (tmp_path / "two.json").write_text('[{"text": "a"}]\n[{"text": "b"}]\n')
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    for name, message in (
        ("b.parquet", "not a whole parquet"),
        ("a.json", "element 2"),
        ("two.json", "more follows the array's end, after element 1"),
        ("a.txt", "byte 3: is not UTF-8"),
    ):
        with pytest.raises(InputError, match=f"{name}:.* ?{message}"):
            list(read_documents(tmp_path / name, FaultPolicy()))
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        list(read_documents(tmp_path / "none.jsonl", FaultPolicy()))


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.text(max_size=30).map(lambda t: t.encode(errors="ignore").decode()), max_size=8), data=st.data()
)
def test_array_split_anywhere(
    tmp_path_factory: pytest.TempPathFactory, records: list[str], data: st.DataObject
) -> None:
    """A JSON array is read piecewise: the same elements wherever the pieces end."""
    from data_prep.sources import _array_elements

    content = json.dumps(records, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 2]))).encode()
    step = data.draw(st.integers(1, 7))

    class Dribble:
        position = 0

        def read(self, _: int) -> bytes:
            self.position += step
            return content[self.position - step : self.position]

    assert list(_array_elements("a.json", Dribble())) == records
