"""Files to documents: parquet, JSON lines (plain, gzip, zstd), JSON arrays, plain text and code.

`discover` lists the files of a corpus in an order that depends on their names only; `read_documents` streams one file's
documents with bounded memory. A record that is no document is a `Fault` with file and place: `FaultPolicy` stops at
the first one (default) or keeps it on a list and goes on. Nothing is dropped silently.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import orjson

from data_prep.errors import InputError
from data_prep.manifest import MANIFEST, REJECTS, TASKS
from data_prep.streams import ZstdStream, files_below, filesystem, is_url, open_bytes

LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON_SUFFIXES = (".json", ".json.gz", ".json.zst")
ARCHIVE_SUFFIX = ".jsonl.zst.tar"  # as lm_dataformat writes: a tar archive of .jsonl.zst files
DATA_SUFFIXES = (*LINES_SUFFIXES, *JSON_SUFFIXES, ARCHIVE_SUFFIX, ".parquet", ".txt")
REFERENCE_SUFFIXES = (".jsonl", ".json.gz", ".jsonl.zst", ".jsonl.zst.tar", ".txt")  # what it reads, in its order
TEXT_KEY = "text"
# What a step leaves beside its output is no corpus.
OWN_FILES = (MANIFEST, REJECTS)
# StarCoderData's parquet files keep the text under this name; `parquet2jsonl` renames it to TEXT_KEY.
PARQUET_TEXT_KEY = "content"


class Document(NamedTuple):
    """One text and its number in the file: the line, array element or parquet row, from 0."""

    number: int
    text: str


class Part(NamedTuple):
    """A stretch of a file (see division.py): bytes of JSON lines, row groups of parquet; the stop is behind it."""

    start: int
    stop: int
    first: int  # number of its first document in the whole file


class Source(NamedTuple):
    """One input file: where it is, the name that stands for it in seeds (relative, with `/`), and the part of it."""

    path: str
    name: str
    part: Part | None = None


@dataclass(frozen=True)
class Fault:
    """A record that is no document."""

    path: str
    place: str  # "12" (line), "row 7", "element 3"; "after 12": the file cannot be read further
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.place}: {self.reason}"


@dataclass
class FaultPolicy:
    """What happens at a bad record: "stop" raises InputError at the first, "skip" keeps it in `faults` and goes on."""

    on_error: Literal["stop", "skip"] = "stop"
    faults: list[Fault] = field(default_factory=list)

    def __call__(self, fault: Fault) -> None:
        if self.on_error == "stop":
            raise InputError(f"{fault}: mend the file, or leave such records out with --on-error skip")
        self.faults.append(fault)


def discover(inputs: Sequence[str | Path], text_suffixes: Sequence[str] = ()) -> list[Source]:
    """The files of a corpus, sorted by name within each input, in the order of `inputs`.

    A folder, here or behind a URL, contributes all files below it that end in one of DATA_SUFFIXES or `text_suffixes`
    (".py", for code trees); a file stands for itself.

    Raises:
        InputError: an input that is not there, a folder without such files, or a file that is there twice.
    """
    sources: list[Source] = []
    for number, given in enumerate(inputs):
        prefix = f"{number}/" if len(inputs) > 1 else ""
        path = Path(given)
        if is_url(str(given)):
            folder, names = str(given).rstrip("/"), _files_behind(str(given))
        elif path.is_dir():
            folder, names = str(path), [p.relative_to(path).as_posix() for p in files_below(path)]
        elif path.exists():
            folder, names = "", None
        else:
            raise InputError(f"{path}: no such file or folder")
        if names is None:
            sources.append(Source(str(given), prefix + str(given).rsplit("/", 1)[-1]))
            continue
        suffixes = (*DATA_SUFFIXES, *text_suffixes)
        found = sorted(name for name in names if name.endswith(suffixes) and not _is_own(name))
        if not found:
            raise InputError(f"{given}: holds no file that ends in {', '.join(suffixes)} (--text-suffixes adds more)")
        sources.extend(Source(f"{folder}/{name}", prefix + name) for name in found)
    if twice := [path for path, count in Counter(os.path.abspath(s.path) for s in sources).items() if count > 1]:
        raise InputError(f"{twice[0]}: is named twice among the inputs: its documents would be there twice")
    return sources


def _is_own(name: str) -> bool:
    """Whether a step has left this file beside its output, or while it was at work."""
    return name.rsplit("/", 1)[-1] in OWN_FILES or TASKS in name.split("/")


def _files_behind(url: str) -> list[str] | None:
    """The names of all files below a URL that is a folder; None if it is a file."""
    system, path = filesystem(url)
    try:
        if not system.isdir(path):
            return None
        return [name.removeprefix(path.rstrip("/") + "/") for name in system.find(path)]
    except OSError as error:
        raise InputError(f"{url}: cannot be listed ({error.strerror or error})") from None


def read_documents(
    path: str | Path, faults: FaultPolicy, text_key: str | None = None, part: Part | None = None
) -> Iterator[Document]:
    """Stream the documents of one file, or of a part of it; the text is a record's value of `text_key`.

    By default that is `text`, and in a parquet file without it, `content`. A list of strings is joined with blank
    lines; a record that is a bare JSON string is a document itself. Any file that is not parquet, JSON or JSON lines
    is one document.

    Raises:
        InputError: at a file that cannot be read to its end and at a bad record, when `faults` says "stop".
    """
    path, number = str(path), 0
    try:
        for document in _documents(path, faults, text_key, part):
            number = document.number + 1
            yield document
    except InputError as error:  # with "skip" that is the file, not a record
        if faults.on_error == "stop":
            raise
        faults(Fault(path, f"after {number}", f"{str(error).removeprefix(path).lstrip(': ')}; the rest is left out"))


def _documents(path: str, faults: FaultPolicy, text_key: str | None, part: Part | None) -> Iterator[Document]:
    if path.endswith(".parquet"):
        keys = [text_key] if text_key else [TEXT_KEY, PARQUET_TEXT_KEY]
        yield from _parquet_documents(path, faults, keys, part)
    elif path.endswith(LINES_SUFFIXES):
        with open_bytes(path) as stream:
            yield from _line_documents(path, _lines(stream, part), faults, text_key or TEXT_KEY)
    elif path.endswith(ARCHIVE_SUFFIX):
        with open_bytes(path) as stream:
            yield from _line_documents(path, _archived_lines(path, stream), faults, text_key or TEXT_KEY)
    elif path.endswith(JSON_SUFFIXES):
        with open_bytes(path) as stream:
            start = stream.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # type: ignore[attr-defined]
            if start == b"[":
                yield from _array_documents(path, stream, faults, text_key or TEXT_KEY)
            else:
                yield from _line_documents(path, enumerate(stream), faults, text_key or TEXT_KEY)
    else:
        with open_bytes(path) as stream:
            try:
                yield Document(0, stream.read().decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                faults(Fault(path, f"byte {error.start}", "is not UTF-8"))


def _line_documents(path: str, lines: Iterator[tuple[int, bytes]], faults: FaultPolicy, key: str) -> Iterator[Document]:
    for number, line in lines:
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
            if not line:  # an empty file with a byte-order mark
                continue
        record, reason = parse_record(line)
        text, reason = (None, reason) if reason else _text_of(record, key)
        if text is None:
            faults(Fault(path, str(number + 1), reason))
        else:
            yield Document(number, text)


def _lines(stream: BinaryIO, part: Part | None) -> Iterator[tuple[int, bytes]]:
    if part is None:
        yield from enumerate(stream)
        return
    position = stream.seek(part.start)
    for number, line in enumerate(stream, start=part.first):
        yield number, line
        position += len(line)
        if position >= part.stop:
            return


def _archived_lines(path: str, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of all members of an archive, numbered through."""
    number = 0
    try:
        stream.seek(-512, 2)
        if any(stream.read(512)):  # tarfile takes a cut between two members for the end
            raise tarfile.ReadError("its end is missing")
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None:  # a folder
                    continue
                for line in io.BufferedReader(ZstdStream(cast(BinaryIO, content))):
                    yield number, line
                    number += 1
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: is not a whole archive, after line {number} ({error}): fetch it again") from None


def parse_record(line: bytes) -> tuple[Any, str]:
    """The JSON value of a line, or why there is none."""
    try:
        return orjson.loads(line), ""
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return None, "blank line"
        try:
            # What orjson refuses and Python reads: NaN, long integers, lone surrogates (looked for in the text later).
            return json.loads(line), ""
        except UnicodeDecodeError as bad:
            return None, f"is not UTF-8 (byte {bad.start + 1} of the line)"
        except (ValueError, RecursionError):
            return None, f"is not JSON ({str(error).split(': line')[0]})"


def _text_of(record: Any, key: str) -> tuple[str | None, str]:
    """The text of a record, or why it has none."""
    if isinstance(record, dict):
        if key not in record:
            return None, f"has no key {key!r} (--text-key or --jsonl_key names another)"
        value = record[key]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n\n".join(value)
        what = f"{key!r} is "
    else:
        value, what = record, "the record is "
    if isinstance(value, bytes):  # in parquet: some writers store text so
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None, f"{key!r} is not UTF-8"
    if not isinstance(value, str):
        names = {type(None): "null", bool: "a boolean", dict: "an object", list: "a list"}
        return None, what + f"{names.get(type(value), 'a number')}, not text"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return None, f"text holds half of a surrogate pair (character {error.start + 1})"
    return value, ""


def _array_documents(path: str, stream: BinaryIO, faults: FaultPolicy, key: str) -> Iterator[Document]:
    for number, record in enumerate(_array_elements(path, stream)):
        text, reason = _text_of(record, key)
        if text is None:
            faults(Fault(path, f"element {number + 1}", reason))
        else:
            yield Document(number, text)


def _array_elements(path: str, stream: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON array, read piecewise: memory holds a few of them, not the file."""
    import codecs

    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")().decode
    buffer, position, number, size = "", 0, 0, 1 << 20
    ended = False

    def refill() -> None:
        nonlocal buffer, position, ended, size
        try:
            more = stream.read(size)
            buffer, position = buffer[position:] + decode(more, final=not more), 0
        except UnicodeDecodeError:
            raise InputError(f"{path}: element {number + 1}: is not UTF-8") from None
        ended = not more
        size *= 2  # an element longer than the buffer is parsed a few times, not once per megabyte

    def skip(characters: str) -> str:
        """Step over `characters`; the next one, or "" at the end."""
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in characters:
                position += 1
            if position < len(buffer):
                return buffer[position]
            if ended:
                return ""
            refill()

    skip(" \t\r\n")
    position += 1  # the opening bracket, which the caller has seen
    while (first := skip(" \t\r\n" if number == 0 else " \t\r\n,")) != "]":
        if not first:
            raise InputError(f"{path}: ends after element {number}, inside the array: fetch it again")
        while True:
            try:
                element, end = decoder.raw_decode(buffer, position)
                # A number at the buffer's end may go on in the next piece.
                if end < len(buffer) or ended:
                    break
            except ValueError:
                if ended:
                    raise InputError(f"{path}: element {number + 1}: is not JSON") from None
            refill()
        position, size = end, 1 << 20
        yield element
        number += 1
    position += 1
    if skip(" \t\r\n"):
        raise InputError(f"{path}: more follows the array's end, after element {number}: make it one array, or .jsonl")


def _parquet_documents(path: str, faults: FaultPolicy, keys: Sequence[str], part: Part | None) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            key = next((k for k in keys if k in file.schema_arrow.names), None)
            if key is None:
                columns = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: has no column {' or '.join(map(repr, keys))} but {columns}: use --text-key")
            number = part.first if part else 0
            groups = list(range(part.start, part.stop)) if part else None
            for batch in file.iter_batches(batch_size=256, columns=[key], row_groups=groups):
                for cell in batch.column(0):
                    try:
                        text, reason = _text_of({key: cell.as_py()}, key)
                    except UnicodeDecodeError:
                        text, reason = None, f"{key!r} is not UTF-8"
                    if text is None:
                        faults(Fault(path, f"row {number + 1}", reason))
                    else:
                        yield Document(number, text)
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: is not a whole parquet file ({reason}): fetch it again") from None
