"""Files that cannot be read or written to their end: named in one line, or skipped and listed; nothing half-written."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.commands import main
from data_prep.create_hdf5_dataset import main as lmdata
from data_prep.engine import Task, run_step
from data_prep.errors import InputError
from data_prep.manifest import record
from data_prep.sources import FaultPolicy, discover, read_documents


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_an_archive(tmp_path: Path) -> None:
    """Members one after the other, lines numbered through; cut off, it is named."""
    path = tmp_path / "a.jsonl.zst.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("x/1.jsonl.zst", lines("one", "two")), ("x/2.jsonl.zst", lines("three" * 9999))):
            packed = zstandard.compress(content)
            member = tarfile.TarInfo(name)
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
    assert [source.name for source in discover([tmp_path])] == [path.name]
    assert list(read_documents(path, FaultPolicy())) == [(0, "one"), (1, "two"), (2, "three" * 9999)]
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst\.tar: .*fetch it again"):
        list(read_documents(path, FaultPolicy()))


def test_behind_a_url(tmp_path: Path, tokenizer_file: Path) -> None:
    """A folder behind a URL is listed like one here, and gives the same sequences."""
    memory = fsspec.filesystem("memory")
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, content in (("b.jsonl", lines("one", "two")), ("sub/a.jsonl.zst", zstandard.compress(lines("three")))):
        (tmp_path / "in" / name).write_bytes(content)
        memory.pipe(f"/corpus/{name}", content)
    assert [s.name for s in discover(["memory://corpus"])] == [s.name for s in discover([tmp_path / "in"])]
    for source, out in (("memory://corpus", "remote"), (str(tmp_path / "in"), "local")):
        main(["tokenize", source, "--out", str(tmp_path / out), "--tokenizer", str(tokenizer_file)])
    counts = [json.loads((tmp_path / out / "manifest.json").read_text())["counts"] for out in ("remote", "local")]
    assert counts[0] == counts[1]
    assert counts[0]["documents"] == 3
    for url, message in (
        ("memory://corpus/none.jsonl", "none.jsonl: "),
        ("nope://x/a.jsonl", "cannot be opened .Protocol not known"),
    ):
        with pytest.raises(InputError, match=message):
            main(["tokenize", url, "--out", str(tmp_path / "x"), "--tokenizer", str(tokenizer_file)])


def test_damaged_files_are_skipped_and_listed(tmp_path: Path, tokenizer_file: Path) -> None:
    """What can be read of them is kept. Planted: such files always stop the step -> fails."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl.zst").write_bytes(zstandard.compress(lines(*map(str, range(9000))))[:-30])
    table = pyarrow.table({"text": ["x" * 99] * 9})
    pyarrow.parquet.write_table(table, source / "whole.parquet")
    (source / "b.parquet").write_bytes((source / "whole.parquet").read_bytes()[:-40])
    (source / "c.jsonl").write_bytes(b"")
    command = ["tokenize", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_file)]
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: damaged or cut off"):
        main(command)
    main([*command, "--on-error", "skip"])
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").open()]
    assert [Path(reject["file"]).name for reject in rejects] == ["a.jsonl.zst", "b.parquet"]
    assert all(
        reject["place"].startswith("after ") and "the rest is left out" in reject["reason"] for reject in rejects
    )
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["rejected"] == 2
    assert counts["documents"] >= 9
    with pytest.raises(InputError, match=r"b\.parquet:row 1 or after: .*--on-error skip"):
        main(["parquet2jsonl", str(source), "--out", str(tmp_path / "lines")])
    main(["parquet2jsonl", str(source), "--out", str(tmp_path / "lines"), "--on-error", "skip"])
    assert sorted(p.name for p in (tmp_path / "lines").iterdir()) == ["manifest.json", "rejects.jsonl", "whole.jsonl"]


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: who runs tests as root may read everything."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read .Permission denied"):
        list(read_documents(tmp_path / "a.jsonl", FaultPolicy()))


def test_a_link_to_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    """Planted: `is_file` alone -> a corpus without that file, no error, fails."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(lines("one"))
    for name in ("b.jsonl", "c.parquet", "notes"):
        (tmp_path / "in" / name).symlink_to("../gone")
    common = [str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"in/b\.jsonl: cannot be read .No such file"):
        main(["tokenize", *common, "--tokenizer", str(tokenizer_file)])
    with pytest.raises(InputError, match=r"in/c\.parquet: cannot be read .No such file"):
        main(["parquet2jsonl", *common])
    (tmp_path / "in/b.jsonl").unlink()
    (tmp_path / "in/c.parquet").unlink()
    main(["tokenize", *common, "--tokenizer", str(tokenizer_file)])


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: `Path.rglob`, which passes over it -> a corpus without that folder, no error, fails."""
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.jsonl").write_bytes(lines("one"))
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"in/sub: cannot be listed .Permission denied"):
        discover([tmp_path / "in"])
    with pytest.raises(InputError, match=r"in/sub: cannot be listed"):
        main(["parquet2jsonl", str(tmp_path / "in"), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="only Linux has a file that gives an input/output error"
)
def test_every_fault_in_one_corpus(tmp_path: Path, tokenizer_file: Path) -> None:
    """Each kind of damage once, in the order of the files: stopping names the first that is left; skipping lists all
    of them with their places, counts them, and keeps every good record."""
    source = tmp_path / "in"
    source.mkdir()
    good = json.dumps({"text": "good"}).encode()
    bad_lines = {  # file -> (its bad record, what is said of it); the record stands between two good ones
        "a_json": (b'{"text": "bad', "is not JSON"),
        "b_key": (b'{"txt": "bad"}', "has no key 'text'"),
        "c_null": (b'{"text": null}', "is null, not text"),
        "d_number": (b'{"text": 1.5}', "is a number, not text"),
        "e_list": (b'{"text": ["a", 1]}', "is a list, not text"),
        "f_bytes": (b'{"text": "\xff"}', "is not UTF-8"),
        "g_surrogate": (rb'{"text": "\udc00"}', "half of a surrogate pair"),
        "h_blank": (b"  ", "blank line"),
    }
    for name, (line, _) in bad_lines.items():
        (source / f"{name}.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    many = b"".join(json.dumps({"text": str(number)}).encode() + b"\n" for number in range(9000))
    (source / "i_cut.jsonl.zst").write_bytes(zstandard.compress(many)[:-40])
    broken = bytearray(zstandard.compress(good))
    broken[4:8] = b"\xff" * 4
    (source / "j_broken.jsonl.zst").write_bytes(broken)
    (source / "k_cut.jsonl.gz").write_bytes(gzip.compress(many)[:-40])
    column = (
        pyarrow.array([b"good", b"\xff\xfe", None, b"good"], pyarrow.binary()).cast(pyarrow.binary()).view("string")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), source / "l_rows.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good"] * 9}), tmp_path / "whole.parquet")
    (source / "m_cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-30])
    (source / "n_column.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes().replace(b"text", b"tixt"))
    (source / "o_empty.jsonl").write_bytes(b"")
    (source / "p_text.txt").write_bytes(b"bad \xff")
    (source / "q_cut.json").write_bytes(b"[" + good + b"," + good[:-4])
    (source / "r_unreadable.jsonl").symlink_to("/proc/self/mem")
    expected = [(f"{name}.jsonl", "2", reason) for name, (_, reason) in bad_lines.items()] + [
        ("i_cut.jsonl.zst", "after ", "damaged or cut off"),
        ("j_broken.jsonl.zst", "after 0", "damaged or cut off"),
        ("k_cut.jsonl.gz", "after ", "damaged or cut off"),
        ("l_rows.parquet", "row 2", "is not UTF-8"),
        ("l_rows.parquet", "row 3", "is null, not text"),
        ("m_cut.parquet", "after 0", "is not a whole parquet file"),
        ("n_column.parquet", "after 0", "has no column 'text' or 'content' but tixt"),
        ("p_text.txt", "byte 4", "is not UTF-8"),
        ("q_cut.json", "after 1", "element 2: is not JSON"),
        ("r_unreadable.jsonl", "after 0", "cannot be read (Input/output error)"),
    ]
    command = ["tokenize", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_file)]
    main([*command, "--on-error", "skip"])
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").open()]
    for reject, (name, place, reason) in zip(rejects, expected, strict=True):
        assert Path(reject["file"]).name == name
        assert reject["place"].startswith(place)
        assert reason in reject["reason"]
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts["rejected"] == len(expected)
    whole = sum(int(r["place"].removeprefix("after ")) for r in rejects if r["file"].endswith(("l.zst", "l.gz")))
    assert counts["documents"] == 2 * len(bad_lines) + whole + 2 + 1
    first = {name: (place, reason) for name, place, reason in reversed(expected)}
    for name in sorted(first):
        with pytest.raises(InputError) as caught:
            main([*command, "--overwrite"])
        message, (place, reason) = str(caught.value), first[name]
        assert name in message
        assert reason.split(" (")[0] in message
        assert place.startswith("after") or f":{place}:" in message
        assert "\n" not in message
        (source / name).unlink()
    main([*command, "--overwrite"])  # nothing is left but the empty file


@pytest.mark.parametrize(
    ("step", "limit"),
    [
        ("tokenize", 20_000),
        ("tokenize", 90),  # not even an empty HDF5 file
        ("parquet2jsonl", 20_000),
        ("partition", 20_000),
        ("fim", 20_000),
        ("shuffle", 20_000),
    ],
)
def test_a_full_disk(tmp_path: Path, tokenizer_file: Path, repo_root: Path, step: str, limit: int) -> None:
    """A limit on a file's size stands for it: one line, exit 2, nothing left; with room the same command works.

    Planted: no `full_disk` in the engine -> a traceback, fails; a file left that could not even be begun -> the same
    command is refused, fails.
    """
    texts = [os.urandom(40_000).hex() for _ in range(5)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(lines(*texts))
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "in/a.parquet")
    rows = str(tmp_path / "rows")
    main(["tokenize", str(tmp_path / "in/a.jsonl"), "--out", rows, "--tokenizer", str(tokenizer_file)])
    options = {
        "tokenize": [str(tmp_path / "in/a.jsonl"), "--tokenizer", str(tokenizer_file)],
        "fim": [rows, "--tokenizer", str(tokenizer_file), "--rate", "0.5"],
        "shuffle": [rows, "--files", "2"],
        "parquet2jsonl": [str(tmp_path / "in")],
        "partition": [str(tmp_path / "in/a.jsonl"), "--valid", "0.5"],
    }[step]
    command = [sys.executable, "-m", "tools.cli", "data", step, *options, "--out", str(tmp_path / "out")]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "cannot be written (File too large): make room" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, cwd=repo_root, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["manifest.json", "data_params.json"])
def test_a_disk_that_is_full_at_the_end(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """When all rows are written and the last file has no room. Planted: not caught there -> an OSError, fails."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(lines("one", "two " * 99))
    command = ["LMData", "--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--eos_id", "2",
               "--encoder_file", str(tokenizer_file), "--max_seq_length", "16", "--reference-compat"]  # fmt: skip
    write = Path.write_text

    def full(path: Path, text: str) -> int:
        if path.name == f"{name}.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\): make room"):
            lmdata(command)
    lmdata(command)
    assert (tmp_path / "out/manifest.json").exists()
    assert (tmp_path / "out/data_params.json").exists()


def die_once(argument: tuple[str, str]) -> dict[str, object]:
    """A task whose worker is killed the first time that it is done."""
    name, folder = argument
    mark = Path(folder, "killed")
    if name == "b" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return record(counts={"tasks": 1})


def test_a_worker_is_killed(tmp_path: Path) -> None:
    """By the system, where memory is short: one line, and the same command goes on. Planted: not caught -> a traceback
    of BrokenProcessPool, fails."""
    tasks = [Task(name, (name, str(tmp_path))) for name in "abc"]
    with pytest.raises(InputError, match="out: a worker process was killed: run the same command again"):
        run_step("kill", tmp_path / "out", tasks, die_once, settings={}, processes=2)
    manifest = run_step("kill", tmp_path / "out", tasks, die_once, settings={}, processes=2)
    assert manifest["counts"]["tasks"] == 3


def how_it_is_interrupted(_: str) -> dict[str, object]:
    return record(counts={"dies_at_once": signal.getsignal(signal.SIGINT) is signal.SIG_DFL})


def test_workers_die_of_an_interrupt(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes. Planted: KeyboardInterrupt in the workers -> fails here; at a terminal, with six
    workers, every fourth such command hung, for the interrupt left a queue's lock to nobody."""
    tasks = [Task(name, name) for name in "abc"]
    manifest = run_step("ask", tmp_path / "out", tasks, how_it_is_interrupted, settings={}, processes=2)
    assert manifest["counts"]["dies_at_once"] == 3


def test_a_run_that_stopped_goes_on_with_skip(tmp_path: Path, tokenizer_file: Path) -> None:
    """What was done before the bad record is kept; the bytes are those of a run that skipped from the start. Not the
    other way round: what skipped has left something out. Planted: on_error in the fingerprint -> refused, fails."""
    (tmp_path / "in").mkdir()
    for name in "abcd":
        (tmp_path / f"in/{name}.jsonl").write_bytes(lines(*map(str, range(50))) + b"{\n" * (name == "c"))
    command = ["tokenize", str(tmp_path / "in"), "--tokenizer", str(tokenizer_file), "--shard-mb", "0"]
    with pytest.raises(InputError, match=r"c\.jsonl:51"):
        main([*command, "--out", str(tmp_path / "a")])
    records = sorted(p.name for p in (tmp_path / "a/.tasks").rglob("*.json"))
    assert len(records) == 3  # two tasks and settings.json
    for out in "ab":
        main([*command, "--out", str(tmp_path / out), "--on-error", "skip"])
    contents = [
        {p.relative_to(tmp_path / out): p.read_bytes() for p in sorted((tmp_path / out).rglob("*")) if p.is_file()}
        for out in "ab"
    ]
    assert contents[0] == contents[1]
    with pytest.raises(InputError, match="holds the output of other settings"):
        main([*command, "--out", str(tmp_path / "a")])
