"""`crystalcoder finetune`: conversations to masked sequences, and a look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from data_prep.errors import InputError
from data_prep.sequences import SequenceWriter
from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import DEFAULT_SYSTEM_PROMPT, EOS, Conversation, Encoded, control_token_ids, encode
from finetune.packing import PackedRows
from finetune.show import show as show_rows
from finetune.sources import read_conversations

OUTPUT_NAME = "data-00000.h5"

app = typer.Typer(
    add_completion=False,
    help="Conversations to masked sequences.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

TokenizerOption = Annotated[Path, typer.Option("--tokenizer", help="tokenizer.json with the CrystalCoder tokens")]


@app.command()
def prepare(
    sources: Annotated[list[Path], typer.Argument(metavar="SRC...", help=".json or .jsonl files of conversations")],
    out: Annotated[Path, typer.Option(help="folder to write the sequences to")],
    tokenizer: TokenizerOption,
    max_seq_length: Annotated[int, typer.Option(min=1, help="length of a row, in tokens")] = 2048,
    seed: Annotated[int, typer.Option(help="of the order of the rows")] = 1,
    system: Annotated[
        str, typer.Option(help="system prompt of conversations that have none; '' for none")
    ] = DEFAULT_SYSTEM_PROMPT,
) -> None:
    """Encode conversations, pack them into rows with a loss mask, shuffle the rows, write one HDF5 file."""
    encoder = load_tokenizer(tokenizer)
    pad_id = control_token_ids(encoder)[EOS]
    documents: list[Encoded] = []
    for source in sources:
        conversations = [c.with_system(system) for c in read_conversations(source)]
        documents += encode(conversations, encoder)
        print(f"{source}: {len(conversations):,} conversations, {_count_empty(conversations):,} with an empty answer")

    rows = PackedRows(documents, seq_length=max_seq_length, pad_id=pad_id)
    if not rows.num_trained_tokens:
        raise InputError(f"{sources[0]}: no assistant token to train on in the whole data: is it the right file?")
    path = out / OUTPUT_NAME
    with SequenceWriter(path, max_seq_length) as writer:
        for row in np.random.default_rng(seed).permutation(len(rows)):
            writer.write(rows[int(row)][np.newaxis])
    print(
        f"{path}: {len(rows):,} rows of {max_seq_length} from {rows.num_tokens:,} tokens, "
        f"{rows.num_trained_tokens:,} of them trained ({rows.num_trained_tokens / rows.num_tokens:.1%})"
    )


def _count_empty(conversations: list[Conversation]) -> int:
    return sum(any(t.role == "assistant" and not t.text for t in c.turns) for c in conversations)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="an .h5 file, a folder of them, or processed .jsonl")],
    tokenizer: TokenizerOption,
    start: Annotated[int, typer.Option(min=0, help="first row")] = 0,
    count: Annotated[int, typer.Option(min=1, help="how many rows")] = 1,
) -> None:
    """Print rows with the trained tokens coloured (between ⟦ ⟧ where there is no colour)."""
    show_rows(path, load_tokenizer(tokenizer), Console(), start=start, count=count)


def main(arguments: list[str]) -> None:
    """The `crystalcoder finetune` subcommand."""
    app(args=arguments, prog_name="crystalcoder finetune")
