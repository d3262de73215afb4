"""`crystalcoder chat`: talk to a Hugging Face checkpoint in the terminal.

crystalcoder chat DIR                       a conversation; the answer appears as it is written
crystalcoder chat DIR --message "Hello"     one question, one answer
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import InputError, exits_on_bad_input
from data_prep.tokenizer import load_tokenizer_once
from finetune.chat_format import DEFAULT_SYSTEM_PROMPT, Turn, encode_prompt
from finetune.templates import CRYSTALCHAT, ChatTemplate, template_beside
from tools.generate import GREEDY, MaxNewTokens, Sampling, Seed, Temperature, TopP, continuation
from tools.hf_checkpoint import SYSTEM_FILE, Device, Directory, Dtype, DtypeOption, load_checkpoint

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def answer(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling = GREEDY,
    streamer: Any = None,
    template: ChatTemplate = CRYSTALCHAT,
) -> str:
    """The assistant's next turn.

    messages: {"role": "system" | "user" | "assistant", "content": str}, the last one the user's. Control tokens that a
        text spells out stay text.
    streamer: is given the tokens as they come (transformers' TextStreamer and its kin).

    Raises:
        InputError: the conversation fills the model's context.
    """
    if template == CRYSTALCHAT:
        before = tokenizer.encode_chat(messages)
    else:
        turns: list[Any] = [Turn(message["role"], message["content"]) for message in messages]  # type: ignore[arg-type]
        before = encode_prompt(turns, load_tokenizer_once(str(tokenizer.name_or_path)), template)
    # A model that was not taught to stop after earlier answers may begin the next user turn instead.
    stops = tokenizer.convert_tokens_to_ids(list(template.stops))
    return continuation(model, tokenizer, before, sampling, stops=stops, anchor=[], streamer=streamer)


@app.command()
@exits_on_bad_input
def chat(
    directory: Directory,
    message: Annotated[str | None, typer.Option(help="ask this, print the answer, and end")] = None,
    system: Annotated[
        str | None,
        typer.Option(help="the system prompt, by default the one that the tuning data got; '' for none"),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Talk to a checkpoint. /reset forgets the conversation; an empty line or Ctrl-D ends it."""
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    model, tokenizer = load_checkpoint(directory, device=device, dtype=dtype.value)
    if system is None:
        system = system_beside(directory)
    opening = [{"role": "system", "content": system}] if system else []
    if message is not None:
        print(
            answer(
                model,
                tokenizer,
                [*opening, {"role": "user", "content": message}],
                sampling,
                template=template_beside(directory),
            )
        )
    else:
        converse(model, tokenizer, opening, sampling, template_beside(directory))


def system_beside(directory: Path) -> str:
    """The system prompt that an exported model was tuned with; CrystalChat's where the directory says nothing."""
    file = directory / SYSTEM_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else DEFAULT_SYSTEM_PROMPT


def converse(
    model: Any,
    tokenizer: Any,
    opening: Sequence[Mapping[str, str]],
    sampling: Sampling,
    template: ChatTemplate = CRYSTALCHAT,
) -> None:
    """Read user turns from stdin and stream the answers to stdout, until an empty line or the end of the input."""
    from transformers import TextStreamer

    turns = list(opening)
    while said := _read_turn():
        if said == "/reset":
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": said})
        try:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            turns.append(
                {"role": "assistant", "content": answer(model, tokenizer, turns, sampling, streamer, template)}
            )
        except InputError as error:
            turns.pop()
            print(f"error: {error}; /reset starts a new conversation", file=sys.stderr)
        except KeyboardInterrupt:
            turns.pop()
            print()


def _read_turn() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main(arguments: list[str]) -> None:
    """What `crystalcoder chat` runs."""
    app(args=arguments, prog_name="crystalcoder chat")


if __name__ == "__main__":
    app()
