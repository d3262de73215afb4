"""`crystalcoder generate`: complete or infill a text with a Hugging Face checkpoint.

crystalcoder generate DIR --prompt "def fibonacci(n):"
crystalcoder generate DIR --prefix "def add(a, b):" --suffix "print(add(1, 2))"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from data_prep.errors import InputError, exits_on_bad_input
from tools.hf_checkpoint import Device, Directory, Dtype, DtypeOption, load_checkpoint

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

MaxNewTokens = Annotated[int, typer.Option(min=1, help="stop after so many tokens, if the text does not end before")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; 1: as the model says")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="sample among the likeliest tokens of this joint share")]
Seed = Annotated[int | None, typer.Option(help="the same seed gives the same text on the same machine")]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy, and then `top_p` and `seed` do not matter."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


def complete(model: Any, tokenizer: Any, prompt: str, sampling: Sampling = GREEDY, streamer: Any = None) -> str:
    """What the model writes after `prompt`, taken as the beginning of a document.

    Raises:
        InputError: the prompt fills the model's context.
    """
    before = [tokenizer.bos_token_id, *tokenizer.encode_text(prompt)]
    return continuation(model, tokenizer, before, sampling, streamer=streamer)


def infill(
    model: Any, tokenizer: Any, prefix: str, suffix: str, sampling: Sampling = GREEDY, *, published: bool = False
) -> str:
    """What the model writes between `prefix` and `suffix`.

    published: the model is one of the published CrystalCoders, whose infilling format differs slightly
        (`CrystalCoderTokenizerFast.encode_infill`).

    Raises:
        InputError: prefix and suffix fill the model's context.
    """
    marks = tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    before = tokenizer.encode_infill(prefix, suffix, published=published)
    # What follows stands behind the prefix; the published format starts it as a text of its own.
    anchor = [] if published else [tokenizer.bos_token_id, *tokenizer.encode_text(prefix)]
    return continuation(model, tokenizer, before, sampling, stops=marks, anchor=anchor)


def continuation(
    model: Any,
    tokenizer: Any,
    before: Sequence[int],
    sampling: Sampling,
    *,
    stops: Sequence[int] = (),
    anchor: Sequence[int] | None = None,
    streamer: Any = None,
) -> str:
    """The text that the model writes after the ids `before`, up to </s> or one of `stops`, which are left out.

    anchor: the ids that the text continues, for the space at its start; `before` if not given.

    Raises:
        InputError: `before` leaves no room in the model's context.
    """
    import torch
    from transformers import GenerationConfig, set_seed

    room = model.config.n_positions - len(before)
    if room < 1:
        raise InputError(
            f"the prompt has {len(before)} tokens and the model's context is {model.config.n_positions}: shorten it"
        )
    if sampling.temperature > 0 and sampling.seed is not None:
        set_seed(sampling.seed)
    ends = [tokenizer.eos_token_id, *stops]
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
        **chosen,
    )
    prompt = torch.tensor([list(before)], device=model.device)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=streamer
    )[0, len(before) :].tolist()
    if written and written[-1] in ends:
        written.pop()
    anchor = list(before if anchor is None else anchor)
    # Decoded together with what stands before: alone, a text loses the space at its start.
    whole = tokenizer.decode(anchor + written, skip_special_tokens=True)
    return whole[len(tokenizer.decode(anchor, skip_special_tokens=True)) :]


@app.command()
@exits_on_bad_input
def generate(
    directory: Directory,
    prompt: Annotated[str | None, typer.Option(help="the beginning of a text")] = None,
    prefix: Annotated[str | None, typer.Option(help="with --suffix: the text before the gap")] = None,
    suffix: Annotated[str | None, typer.Option(help="with --prefix: the text after the gap")] = None,
    published_fim: Annotated[
        bool, typer.Option("--published-fim", help="infill as the published weights were trained to")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Print what the model writes after --prompt, or between --prefix and --suffix."""
    wants_infill = prefix is not None or suffix is not None
    if (prompt is None) != wants_infill:
        raise InputError("give either --prompt, or --prefix and --suffix")
    if published_fim and not wants_infill:
        raise InputError("--published-fim is about infilling: give --prefix and --suffix with it")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    model, tokenizer = load_checkpoint(directory, device=device, dtype=dtype.value)
    if prompt is not None:
        print(complete(model, tokenizer, prompt, sampling))
    else:
        print(infill(model, tokenizer, prefix or "", suffix or "", sampling, published=published_fim))


def main(arguments: list[str]) -> None:
    """What `crystalcoder generate` runs."""
    app(args=arguments, prog_name="crystalcoder generate")


if __name__ == "__main__":
    app()
