"""`crystalcoder finetune prepare` and `show`: examples to masked rows, and a look at them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from data_prep.errors import InputError
from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import ChatFormat
from finetune.conversation import DEFAULT_SYSTEM_PROMPT
from finetune.prepare import PREPARE_FILE, REJECTS_FILE, VALID, PrepareOptions, prepare
from finetune.recipe import RECIPES, parse_source, read_recipe
from finetune.show import show as show_rows
from finetune.show import write_html
from finetune.templates import TEMPLATES, load_template

app = typer.Typer(
    add_completion=False,
    help="Instruction tuning: prepare data, look at it, train, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SHIPPED = " or ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
TokenizerOption = Annotated[
    Path, typer.Option("--tokenizer", help="tokenizer.json with the CrystalCoder tokens, or a folder that holds one")
]


@app.command("prepare")
def prepare_command(
    out: Annotated[Path, typer.Option(help="folder to write the rows to")],
    tokenizer: TokenizerOption,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC...",
            help=".json, .jsonl, .parquet, .txt files or folders of them; SRC@2 is seen twice, SRC@0.5 half of it "
            "once; or one .yaml: a recipe",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"YAML list of sources with epochs or weights, instead: a file, or {SHIPPED}"),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="folder of the recipe's files [default: the recipe's own]")] = None,
    max_seq_length: Annotated[int, typer.Option(min=2, help="length of a row, in tokens")] = 2048,
    packing: Annotated[
        Literal["concatenate", "best-fit"],
        typer.Option(help="concatenate and cut, as the reference did; or whole conversations, best fit"),
    ] = "concatenate",
    template: Annotated[
        str, typer.Option(help=f"chat template: {', '.join(TEMPLATES)}, or a YAML file")
    ] = "crystalchat",
    system: Annotated[
        str, typer.Option(help="system prompt of conversations that have none; '' for none")
    ] = DEFAULT_SYSTEM_PROMPT,
    train: Annotated[
        Literal["assistant", "last", "all"],
        typer.Option(help="what is trained: every answer, the last answer alone, or all text"),
    ] = "assistant",
    train_turn_ends: Annotated[
        bool, typer.Option(help="also train the start of the user turn that follows an answer")
    ] = False,
    long: Annotated[
        Literal["cut", "truncate", "split", "drop"] | None,
        typer.Option(
            help="conversations longer than a row: cut anywhere [concatenate's default], truncate at a turn "
            "[best-fit's], split into several, drop",
            show_default=False,
        ),
    ] = None,
    valid: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="share of conversations to hold out, in OUT/valid")
    ] = 0,
    dedup: Annotated[bool, typer.Option(help="leave out exact repetitions within a source")] = True,
    seed: Annotated[int, typer.Option(help="of the order of rows, and of who is held out")] = 1,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help=f"at a bad record: stop, or skip and list it in {REJECTS_FILE}")
    ] = "stop",
) -> None:
    """Encode examples, pack them into rows with a loss mask, shuffle the rows, write HDF5 files."""
    if sources and len(sources) == 1 and sources[0].endswith((".yaml", ".yml")) and recipe is None:
        recipe, sources = sources[0], None
    if bool(sources) == (recipe is not None):
        raise InputError("give source files, or --recipe, and not both")
    if root is not None and recipe is None:
        raise InputError("--root is the folder of a recipe's files: give --recipe with it")
    settings = read_recipe(recipe, root) if recipe else [parse_source(source) for source in sources or ()]
    options = PrepareOptions(
        max_seq_length=max_seq_length,
        packing=packing,
        chat_format=ChatFormat(load_template(template), train, train_turn_ends),
        system=system,
        long=long,
        valid=valid,
        dedup=dedup,
        seed=seed,
        on_error=on_error,
    )
    report(prepare(settings, out, load_tokenizer(tokenizer), options), out)


def report(facts: dict[str, Any], out: Path) -> None:
    """Print what `prepare` did."""
    for source in facts["sources"]:
        kinds = [f"{source[kind]:,} {kind.replace('_', ' ')}" for kind in ("conversations", "texts", "ready_rows")]
        told = [kind for kind in kinds if not kind.startswith("0 ")] or ["nothing"]
        quiet = ("path", "conversations", "turns", "texts", "ready_rows", "tokens", "epochs")
        told += [f"{value:,} {key.replace('_', ' ')}" for key, value in source.items() if key not in quiet]
        if source["epochs"] != 1:
            told.append(f"seen {source['epochs']:g} times")
        print(f"{source['path']}: {', '.join(told)}")
    for name in ("train", VALID):
        if name in facts:
            side = facts[name]
            folder = out if name == "train" else out / VALID
            share = side["trained_tokens"] / max(side["tokens"], 1)
            rows = f"{side['rows']:,} rows of {facts['settings']['max_seq_length']}"
            print(
                f"{folder}: {rows}, {side['fill']:.1%} full, from {side['documents']:,} documents "
                f"of {side['tokens']:,} tokens, {side['trained_tokens']:,} of them trained ({share:.1%})"
            )
    if facts["rejected"]:
        print(f"{out / REJECTS_FILE}: {facts['rejected']:,} records left out, with the reasons")
    print(f"{out / PREPARE_FILE}: all counts; `crystalcoder finetune show {out}` shows rows before a run")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="an .h5 file, a folder of them, or processed .jsonl")],
    tokenizer: TokenizerOption,
    start: Annotated[int, typer.Option(min=0, help="first row")] = 0,
    count: Annotated[int, typer.Option(min=1, help="how many rows")] = 1,
    html: Annotated[Path | None, typer.Option(help="write an HTML page instead")] = None,
) -> None:
    """Print rows with the trained tokens coloured (between ⟦ ⟧ where there is no colour)."""
    reader = load_tokenizer(tokenizer)
    if tokenizer_of(path) not in (None, reader.fingerprint):
        print(
            f"note: {path} was made with another tokenizer.json: where words look odd, give that one", file=sys.stderr
        )
    if html is not None:
        write_html(path, reader, html, start=start, count=count)
        print(f"{html}: written")
    else:
        show_rows(path, reader, Console(), start=start, count=count)


def tokenizer_of(path: Path) -> str | None:
    """Fingerprint of the tokenizer that rows were prepared with, if `prepare.json` lies with them."""
    for folder in (path, *path.parents[:2]):
        try:
            made_with: str = json.loads((folder / PREPARE_FILE).read_text())["settings"]["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return made_with
    return None
