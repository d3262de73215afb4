"""parquet2jsonl: lines as the reference's data frames write them, whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.parquet2jsonl import json_line

texts = st.text(max_size=20).map(lambda t: t.encode(errors="ignore").decode())
scalars = texts | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.none() | st.floats()
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=3)


def finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, list):
        return [finite(part) for part in value]
    return {key: finite(part) for key, part in value.items()} if isinstance(value, dict) else value


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(texts, values, max_size=4))
def test_lines(row: dict[str, Any]) -> None:
    """ASCII, compact, slashes escaped, NaN as null; the value comes back, and strings are spelt as Python's json does.

    Planted: `\\U%08x` for characters beyond the first plane -> fails; slashes left -> fails.
    """
    line = json_line(row)
    assert json.loads(line) == finite(row)
    assert line.isascii()
    assert line.endswith(b"}\n")
    assert line.count(b"/") == line.count(b"\\/")
    strings = {key: value for key, value in row.items() if isinstance(value, str)}
    spelt = json.dumps(strings, separators=(",", ":")).replace("/", "\\/") + "\n"
    assert json_line(strings).decode().replace("\x7f", "\\u007f") == spelt  # DEL: as pandas, unescaped


def test_columns(tmp_path: Path) -> None:
    """Types that JSON has no word for, and integers with gaps, which a data frame holds as floats."""
    import datetime
    import decimal

    table = pyarrow.table(
        {
            "content": ["é/", "b"],
            "big": [2**53 + 1, None],
            "when": [datetime.datetime(2023, 5, 1), None],
            "exact": [decimal.Decimal("1.50"), None],
            "tags": [["x", "y"], []],
            "meta": [{"a": 1, "b": "/"}, None],
        }
    )
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "in/a.parquet")
    main(["parquet2jsonl", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    first, second = (tmp_path / "out/a.jsonl").read_text(encoding="ascii").splitlines()
    assert first == (
        r'{"text":"\u00e9\/","big":9007199254740992.0,"when":"2023-05-01 00:00:00","exact":"1.50","tags":["x","y"],'
        r'"meta":{"a":1,"b":"\/"}}'
    )
    assert second == '{"text":"b","big":null,"when":null,"exact":null,"tags":[],"meta":null}'


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    """Planted: not looked for -> one of them is lost, fails."""
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: has two columns of the name text"):
        main(["parquet2jsonl", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) if path.name != "rejects.jsonl"
            for line in path.open()]  # fmt: skip


def test_bytes_and_far_dates(tmp_path: Path) -> None:
    """Text that was stored as bytes is text, nanoseconds are cut off; a row without JSON is named, or left out alone.

    Planted: `str` of bytes -> b'…' in the text, fails; the batch left out for one row of it -> fails.
    """
    table = pyarrow.table(
        {
            "content": pyarrow.array([b"a\xc3\xa9", b"\xff", b"c", b"d"], pyarrow.binary()),
            "when": pyarrow.array([1_500_000_001, 0, 0, 0], pyarrow.timestamp("ns")),
            "far": pyarrow.array([0, 0, 2**60, None], pyarrow.timestamp("us")),
            "hash": [b"\xfe", b"", b"", b""],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    command = ["parquet2jsonl", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"a\.parquet:row 2: cannot be converted \(Invalid UTF8.*--on-error skip"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--on-error", "skip"])
    first, last = rows_of(tmp_path / "out")
    assert first == {"text": "aé", "when": "1970-01-01 00:00:01.500000", "far": "1970-01-01 00:00:00", "hash": "\\xfe"}
    assert last["text"] == "d"
    assert [json.loads(line)["place"] for line in (tmp_path / "out/rejects.jsonl").open()] == ["row 2", "row 3"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"] == {"documents": 2, "rejected": 2}


def test_a_page_with_a_flipped_bit(tmp_path: Path, tokenizer_file: Path) -> None:
    """Noticed where there are checksums; other row groups are kept. Planted: not checked -> other text, fails."""
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * 400 for number in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False,
                                row_group_size=10, write_page_checksum=True)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(texts[13].encode())] ^= 1
    path.write_bytes(content)
    for step in ("parquet2jsonl", "tokenize"):
        extra = ["--tokenizer", str(tokenizer_file)] if step == "tokenize" else []
        with pytest.raises(InputError, match="CRC checksum verification failed"):
            main([step, str(path), "--out", str(tmp_path / "out"), *extra])
    main(["parquet2jsonl", str(path), "--out", str(tmp_path / "out"), "--on-error", "skip"])
    assert [row["text"] for row in rows_of(tmp_path / "out")] == texts[:10] + texts[20:]
    (reject,) = map(json.loads, (tmp_path / "out/rejects.jsonl").open())
    assert reject["place"] == "row 11 or after"
    assert "left out up to row 20" in reject["reason"]


def test_a_large_file_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes and manifest as of the whole file, from any number of processes and after a kill.

    Planted: integers with gaps looked for in a part only -> 7 beside 7.0, fails; rows of a part counted from its own
    first -> another place in rejects.jsonl, fails; a part opened to append -> torn lines, fails.
    """
    numbers = [7] * 199 + [None]
    texts = pyarrow.array([b"\xff" if n == 150 else b"%d " % n * 99 for n in range(200)], pyarrow.binary())
    (tmp_path / "in/python").mkdir(parents=True)
    table = pyarrow.table({"content": texts, "stars": numbers})
    pyarrow.parquet.write_table(table, tmp_path / "in/python/a.parquet", row_group_size=9, compression="none")
    pyarrow.parquet.write_table(table[:3], tmp_path / "in/b.parquet")
    command = ["parquet2jsonl", str(tmp_path / "in"), "--on-error", "skip", "--out"]

    def contents(out: Path) -> dict[str, bytes]:
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    main([*command, str(tmp_path / "whole")])
    assert len(rows_of(tmp_path / "whole")) == 202
    monkeypatch.setattr("data_prep.parquet2jsonl.PART_BYTES", (4000, 4000))
    renamed: list[str] = []
    replace = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda source, target: [renamed.append(target.name), replace(source, target)])
        main([*command, str(tmp_path / "one")])
    parts = [name for name in renamed if ".part-" in name and not name.endswith(".json")]
    assert len(parts) > 5
    main([*command, str(tmp_path / "two"), "--processes", "2"])
    moments = (3, len(renamed) - 4)
    for moment in moments:
        torn = tmp_path / f"torn_{moment}"
        left = iter(range(moment))

        def die(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", die)
            with pytest.raises(SystemExit):
                main([*command, str(torn)])
        for path in (torn / "python/a.jsonl", *(torn / ".tasks/python" / part for part in parts)):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.with_name(f"{path.name}.partial").write_bytes(b"torn")
        main([*command, str(torn)])
    for out in ("one", "two", *(f"torn_{moment}" for moment in moments)):
        assert contents(tmp_path / out) == contents(tmp_path / "whole"), out
