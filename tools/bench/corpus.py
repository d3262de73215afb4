"""Real text for the data benchmarks, found on any machine: the sources and documentation of the installed libraries."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_prep.errors import InputError

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
DOCSTRING_LENGTH = 300
PROSE_NAMES = ("license", "copying", "notice", "authors", "metadata", "readme", "changes")
FILES = 8  # a corpus is so many files, so that processes have something to share


def tokenizer_file() -> Path:
    """The LLaMA tokenizer.json that the measurements use.

    Raises:
        InputError: there is none.
    """
    shared = Path(os.environ.get("CRYSTALCODER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    path = shared / "data/llama_tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: the benchmark needs a LLaMA tokenizer.json: name its folder in CRYSTALCODER_SHARED")
    return path


def code() -> Iterator[str]:
    """Python source files, each once."""
    return _unlike(_read(path) for path in _files() if path.suffix == ".py")


def prose() -> Iterator[str]:
    """Licences, change logs, descriptions, documentation, and the long docstrings of each source file."""
    for text in _unlike(_read(path) for path in _files() if _is_prose(path)):
        yield text
    for text in code():
        if found := [docstring for docstring in DOCSTRING.findall(text) if len(docstring) >= DOCSTRING_LENGTH]:
            yield "\n\n".join(found)


def write_jsonl(documents: Iterator[str], folder: Path, megabytes: float) -> int:
    """Up to so many megabytes of documents as FILES files of JSON lines; bytes of text."""
    folder.mkdir(parents=True)
    files = [(folder / f"{number}.jsonl").open("wb") for number in range(FILES)]
    size = 0
    for number, text in enumerate(documents):
        files[number % FILES].write(orjson.dumps({"text": text}) + b"\n")
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    for file in files:
        file.close()
    return size


def _files() -> Iterator[Path]:
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"], str(Path(orjson.__file__).parents[1]))):
        for path in sorted(Path(root).rglob("*")):
            if path.is_file() and not ("site-packages" in path.parts and root == paths["stdlib"]):
                yield path


def _is_prose(path: Path) -> bool:
    if {"test", "tests"} & set(path.parts):  # tables of numbers
        return False
    named = path.name.lower().startswith(PROSE_NAMES) and path.suffix != ".py"
    return named or path.suffix in (".rst", ".md", ".txt")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:  # a test file of another encoding
        return ""


def _unlike(texts: Iterator[str]) -> Iterator[str]:
    """The texts without empty ones and repetitions: a hundred copies of one licence are one."""
    seen = {hash("")}  # not the texts: a command's peak memory is never below that of the process that starts it
    for text in texts:
        if hash(text) not in seen:
            seen.add(hash(text))
            yield text
