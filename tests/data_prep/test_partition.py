"""`data partition`: each record in one folder, the same whatever the number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.sources import FaultPolicy, read_documents


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two files of two sources, 400 records."""
    for number in range(2):
        records = [{"text": f"{number} {k}", "meta": {"set": ("Wiki", "C4")[k % 3 == 0]}} for k in range(200)]
        path = tmp_path / f"raw/chunk{number}/x.jsonl.zst"
        path.parent.mkdir(parents=True)
        path.write_bytes(zstandard.compress("\n".join(map(json.dumps, records)).encode()))
    return tmp_path / "raw"


def texts(folder: Path) -> list[str]:
    return [d.text for path in sorted(folder.rglob("*.jsonl.zst")) for d in read_documents(path, FaultPolicy())]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_by_key_and_hold_out(mixed: Path, tmp_path: Path) -> None:
    """Planted: the draw without the file's name -> both files hold out the same lines, fails."""
    for out, more in (("a", []), ("b", ["--processes", "2"])):
        main(["partition", str(mixed), "--out", str(tmp_path / out), "--key", "meta.set", "--valid", "0.1", *more])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    out = tmp_path / "a"
    for source, rest in (("C4", (0,)), ("Wiki", (1, 2))):
        found = texts(out / "train" / source) + texts(out / "valid" / source)
        assert sorted(found) == sorted(f"{n} {k}" for n in range(2) for k in range(200) if k % 3 in rest)
    held_out = texts(out / "valid")
    assert 20 < len(held_out) < 65
    assert {t.split()[1] for t in held_out if t[0] == "0"} != {t.split()[1] for t in held_out if t[0] == "1"}
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["documents"] == 400
    assert counts["documents_valid/C4"] == len(texts(out / "valid/C4"))


def test_killed_between_its_files(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each rename in turn, when files are whole but have not got their names; a torn one is there too.

    Planted: files opened to append -> their records are there twice, or torn, fails.
    """
    command = ["partition", str(mixed), "--key", "meta.set", "--valid", "0.5"]
    main([*command, "--out", str(tmp_path / "whole")])
    whole, replace = contents(tmp_path / "whole"), os.replace
    assert len(whole) == 9
    for moment in range(1, 12):
        out = tmp_path / f"killed_{moment}"
        left = iter(range(moment))

        def die(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", die)
            with pytest.raises(Killed):
                main([*command, "--out", str(out)])
        torn = out / "valid/C4/chunk1/x.jsonl.zst"
        if not torn.exists():
            torn.parent.mkdir(parents=True, exist_ok=True)
            torn.with_name(f"{torn.name}.partial").write_bytes(whole["valid/C4/chunk1/x.jsonl.zst"][:20])
        main([*command, "--out", str(out)])
        assert contents(out) == whole, moment


def test_bad_records(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a", "set": "x"}\n{"text": "b"}\n{"text": "c", "set": "../up"}\nno\n')
    arguments = ["partition", str(source), "--out", str(tmp_path / "out"), "--key", "set"]
    with pytest.raises(InputError, match=r"a\.jsonl:2: 'set' is None, which is no name for a folder"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    main([*arguments, "--on-error", "skip"])
    assert texts(tmp_path / "out") == ["a"]
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").open()]
    assert [reject["place"] for reject in rejects] == ["2", "3", "4"]
    with pytest.raises(InputError, match="give --key, --valid, or both"):
        main(["partition", str(source), "--out", str(tmp_path / "none")])
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(InputError, match=r"b\.txt: is not JSON lines"):
        main(["partition", str(tmp_path), "--out", str(tmp_path / "none"), "--valid", "0.5"])


def test_a_damaged_file_is_skipped(mixed: Path, tmp_path: Path) -> None:
    """What can be read of it is kept, the rest listed. Planted: as before, the step stops in any case -> fails."""
    path = mixed / "chunk0/x.jsonl.zst"
    lines = "".join(
        json.dumps({"text": f"{k} {os.urandom(400).hex()}", "meta": {"set": "C4"}}) + "\n" for k in range(900)
    )
    path.write_bytes(zstandard.compress(lines.encode())[:-40])
    command = ["partition", str(mixed), "--out", str(tmp_path / "out"), "--key", "meta.set"]
    with pytest.raises(InputError, match=r"chunk0/x\.jsonl\.zst: damaged or cut off"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--on-error", "skip"])
    (reject,) = map(json.loads, (tmp_path / "out/rejects.jsonl").open())
    whole = int(reject["place"].removeprefix("after "))
    assert 0 < whole < 900
    assert "damaged or cut off" in reject["reason"]
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts == {"documents": 200 + whole, "documents_C4": 67 + whole, "documents_Wiki": 133, "rejected": 1}
    assert len(texts(tmp_path / "out/C4/chunk0")) == whole
