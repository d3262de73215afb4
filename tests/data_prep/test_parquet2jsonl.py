"""parquet2jsonl: lines as the reference's data frames write them, whole files or none."""

from __future__ import annotations

import json
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
