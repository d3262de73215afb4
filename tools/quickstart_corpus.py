"""The quickstart's corpus: the standard library of the Python that runs this, laid out as the real corpora are.

    OUT/starcoderdata/python/train-0000i-of-0000n.parquet   source files, column `content` (the code domain)
    OUT/slimpajama/{topics,docstrings}/chunk0.jsonl         language reference and module docstrings (the prose domains)
    OUT/validation/chunk0.jsonl                             documents held out of the above
    OUT/instructions.jsonl                                  prompt (signature, docstring) -> completion (function)

Everything is sorted, so the same Python gives the same bytes. Tests and character tables of the library stay out.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from data_prep.errors import InputError, exits_on_bad_input

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
NUM_PARQUET_FILES = 4
HELD_OUT = 20  # one source file in so many is for validation
LONGEST_BODY = 600  # characters of a function in the instruction pairs: what a tiny model can hope to write


class SourceFile(NamedTuple):
    """One file of the library: its path below the library's root, and its text."""

    path: str
    text: str


class ParsedFile(NamedTuple):
    """A file's text and its syntax tree."""

    text: str
    tree: ast.Module


def source_files(max_files: int | None = None) -> list[SourceFile]:
    """The library's own modules in sorted order; with `max_files`, so many of them, spread evenly over the list."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    if max_files is not None:
        paths = paths[:: max(1, len(paths) // max_files)][:max_files]
    files = [SourceFile(p.relative_to(root).as_posix(), p.read_text("utf-8", errors="replace")) for p in paths]
    files = [file for file in files if file.text.strip()]
    if not files:
        raise InputError(f"{root}: no Python source files of the standard library here: use a Python that has them")
    return files


def topics() -> Iterator[str]:
    """The language reference that `help()` shows, one document a topic; nothing where Python comes without it."""
    try:
        from pydoc_data.topics import topics as by_name
    except ImportError:
        return
    yield from (text for _, text in sorted(by_name.items()))


def parsed(files: list[SourceFile]) -> Iterator[ParsedFile]:
    """The files that this Python's grammar accepts."""
    for file in files:
        try:
            yield ParsedFile(file.text, ast.parse(file.text))
        except SyntaxError:  # the library keeps a few files in the grammar of other versions
            continue


def docstrings(files: list[ParsedFile]) -> Iterator[str]:
    """The docstring of each module that has one."""
    for _, tree in files:
        if text := ast.get_docstring(tree):
            yield text


def instruction_pairs(files: list[ParsedFile]) -> Iterator[dict[str, str]]:
    """Signature and docstring of each short, documented function as the prompt, the function without it as answer."""
    seen: set[str] = set()
    for text, tree in files:
        lines = text.splitlines()
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or len(function.body) < 2:
                continue
            docstring = ast.get_docstring(function)
            if not docstring or function.lineno == function.body[1].lineno:
                continue
            answer = _without_docstring(lines, function)
            summary = " ".join(docstring.split("\n\n")[0].split())
            prompt = f"Write the Python function `{function.name}({ast.unparse(function.args)})`. {summary}"
            if (
                len(summary) >= 20
                and len(prompt) <= LONGEST_BODY
                and len(answer) <= LONGEST_BODY
                and prompt not in seen
            ):
                seen.add(prompt)
                yield {"prompt": prompt, "completion": answer}


def _without_docstring(lines: list[str], function: ast.FunctionDef) -> str:
    head = lines[function.lineno - 1 : function.body[0].lineno - 1]
    rest = lines[function.body[0].end_lineno : function.end_lineno]
    return textwrap.dedent("\n".join([*head, *rest])).strip("\n")


def write_corpus(out: Path, max_files: int | None = None) -> dict[str, int]:
    """Write all three parts below `out`; return how many documents each holds."""
    files = source_files(max_files)
    held_out, training = files[HELD_OUT - 1 :: HELD_OUT], [f for i, f in enumerate(files, start=1) if i % HELD_OUT]
    _write_jsonl(out / "validation" / "chunk0.jsonl", [{"text": file.text} for file in held_out])
    code = out / "starcoderdata" / "python"
    code.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PARQUET_FILES):
        part = training[number::NUM_PARQUET_FILES]
        table = pa.table({"max_stars_repo_path": [f.path for f in part], "content": [f.text for f in part]})
        pq.write_table(table, code / f"train-{number:05d}-of-{NUM_PARQUET_FILES:05d}.parquet")

    modules = list(parsed(training))
    prose = {"topics": list(topics()), "docstrings": list(docstrings(modules))}
    if max_files is not None:
        prose["topics"] = prose["topics"][:max_files]
    for domain, texts in prose.items():
        _write_jsonl(out / "slimpajama" / domain / "chunk0.jsonl", [{"text": text} for text in texts])
    pairs = list(instruction_pairs(modules))
    _write_jsonl(out / "instructions.jsonl", pairs)
    return {
        "source files": len(training),
        "held out": len(held_out),
        **{k: len(v) for k, v in prose.items()},
        "instruction pairs": len(pairs),
    }


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@exits_on_bad_input
def main(
    out: Annotated[Path, typer.Argument(help="directory to write the corpus to")],
    max_files: Annotated[int | None, typer.Option(min=1, help="take only so many modules")] = None,
) -> None:
    """Lay out this Python's standard library as a corpus of code, prose and instruction pairs."""
    for name, count in write_corpus(out, max_files).items():
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    typer.run(main)
