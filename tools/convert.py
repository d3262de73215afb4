"""`crystalcoder convert`: checkpoints between Hugging Face and Megatron, at any TP and PP.

The heavy imports stand inside the functions, so that --help is instant.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import InputError, exits_on_bad_input

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class Format(enum.StrEnum):
    """What can be written."""

    hf = "hf"
    torch = "torch"
    torch_dist = "torch_dist"
    legacy = "legacy"


class DType(enum.StrEnum):
    """What can be cast to."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.callback(invoke_without_command=True)
@exits_on_bad_input
def convert(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Option("--from", help="Hugging Face or Megatron checkpoint; its format is found out")
    ] = None,
    target: Annotated[Path | None, typer.Option("--to", help="directory to write; must not exist yet")] = None,
    format: Annotated[
        Format | None, typer.Option(help="what to write [default: torch from Hugging Face, else hf]")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="tensor-parallel size of a Megatron target [default: the source's]")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="pipeline-parallel size of a Megatron target [default: the source's]")
    ] = None,
    vpp: Annotated[
        int | None, typer.Option(min=1, help="virtual-pipeline size: chunks of layers a stage [default: the source's]")
    ] = None,
    pp_layers: Annotated[
        str | None, typer.Option(help="layers of each stage of an uneven pipeline, as 7,9,9,7")
    ] = None,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(min=1, help="pad a Megatron target's vocabulary to a multiple of this times --tp")
    ] = 1,
    true_vocab_size: Annotated[
        int | None, typer.Option(min=1, help="rows of the vocabulary that count, if the source is padded and silent")
    ] = None,
    release: Annotated[bool, typer.Option(help="write Megatron's `release`: weights of no iteration")] = False,
    dtype: Annotated[DType | None, typer.Option(help="cast to this dtype [default: keep what is stored]")] = None,
    hf_config: Annotated[
        str | None, typer.Option(help="directory of config.json and tokenizer, or CrystalCoder for the packaged one")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the target once the new one is complete")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--skip-verify", help="read the result back and compare every tensor")
    ] = True,
    logits: Annotated[bool, typer.Option(help="with --verify, also compare logits on two prompts")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: one a core, 4 at most]")] = None,
    max_queue_size: Annotated[int, typer.Option(min=1, help="most tensors in work at a time")] = 50,
) -> None:
    """Convert a checkpoint: crystalcoder convert --from A --to B [--format torch_dist --tp N --pp N]."""
    if context.invoked_subcommand is not None:
        return
    if source is None or target is None:
        raise InputError("crystalcoder convert needs --from CHECKPOINT and --to DIRECTORY")
    from megatron.crystalcoder.checkpoint.convert import DTYPES, convert
    from megatron.crystalcoder.checkpoint.hf_config import resolve_hf_config_path
    from megatron.crystalcoder.checkpoint.open import open_checkpoint

    chosen: Any = format.value if format else None
    if chosen is None:
        # Going to Megatron, staying there at another layout, or going back.
        chosen = "torch" if open_checkpoint(source).format == "hf" or tp or pp or vpp or pp_layers else "hf"
    if chosen == "hf" and (tp or pp or vpp or pp_layers or release or make_vocab_size_divisible_by != 1):
        raise InputError(
            "--tp, --pp, --vpp, --pp-layers, --release and --make-vocab-size-divisible-by lay out a Megatron "
            "checkpoint; a Hugging Face one has no layout: drop them"
        )
    convert(
        source,
        target,
        format=chosen,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        virtual_pipeline=vpp,
        stage_layers=_numbers(pp_layers) if pp_layers else None,
        vocab_divisor=make_vocab_size_divisible_by,
        true_vocab_size=true_vocab_size,
        release=release,
        dtype=DTYPES[dtype.value] if dtype else None,
        hf_config=resolve_hf_config_path(hf_config) if hf_config else None,
        overwrite=overwrite,
        verify=verify,
        logits=logits,
        workers=workers,
        max_queue_size=max_queue_size,
    )


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError(f"--pp-layers {text}: give the layers of each stage with commas between, as 7,9,9,7")
    return tuple(int(part) for part in text.split(","))


@app.command()
@exits_on_bad_input
def inspect(directory: Annotated[Path, typer.Argument(help="a checkpoint in any format")]) -> None:
    """Tell what a checkpoint is, from its headers: format, layout, sizes, muP constants, dtypes."""
    from megatron.crystalcoder.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(directory)
    config, weights = checkpoint.config, checkpoint.weights
    dtypes = {str(weights.dtype(name)).removeprefix("torch.") for name in weights.names()}
    facts: dict[str, Any] = {"format": checkpoint.format, "parameters": f"{config.num_parameters:,}"}
    if checkpoint.format != "hf":
        facts["written at"] = f"TP{checkpoint.tensor_parallel} PP{checkpoint.pipeline_parallel}"
        facts["iteration"] = f"{checkpoint.iteration}{' (converted)' if checkpoint.is_converted else ''}"
    facts["dtype"] = ", ".join(sorted(dtypes))
    facts |= {name: value for name, value in vars(config).items() if name != "mup"}
    if checkpoint.mup_recorded:
        facts |= {f"mup {name}": value for name, value in vars(config.mup).items()}
    else:
        facts["mup"] = "not recorded"
    for name, value in facts.items():
        print(f"{name:<24}{value}")


def main(arguments: list[str]) -> None:
    """What `crystalcoder convert` runs."""
    app(args=arguments, prog_name="crystalcoder convert")


if __name__ == "__main__":
    app()
