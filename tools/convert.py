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
        str | None,
        typer.Option(
            "--from",
            help="checkpoint of any format (it is found out), or a model on the hub: OWNER/NAME[@REVISION]",
        ),
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
    iteration: Annotated[
        int | None, typer.Option(min=1, help="which of a run's checkpoints [default: the last]")
    ] = None,
    release: Annotated[bool, typer.Option(help="write Megatron's `release`: weights of no iteration")] = False,
    dtype: Annotated[DType | None, typer.Option(help="cast to this dtype [default: keep what is stored]")] = None,
    hf_config: Annotated[
        str | None, typer.Option(help="directory of config.json and tokenizer, or CrystalCoder for the packaged one")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer to put beside the weights: directory or file [default: the source's]")
    ] = None,
    transformer_engine: Annotated[
        bool, typer.Option("--transformer-engine", help="--format torch: names of layers with fused norms")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace the target once the new one is complete")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--skip-verify", help="read the result back and compare every tensor")
    ] = True,
    logits: Annotated[bool, typer.Option(help="with --verify, also compare logits on two prompts")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: one a core, 4 at most]")] = None,
    max_queue_size: Annotated[int, typer.Option(min=1, help="most tensors in work at a time")] = 50,
) -> None:
    """Convert a checkpoint between Hugging Face and Megatron, at any TP and PP. Needs no GPU and little memory.

    \b
    crystalcoder convert --from HF --to MEGATRON --tp 2 --pp 4
    crystalcoder convert --from HF --to MEGATRON --format torch_dist
    crystalcoder convert --from MEGATRON --to HF
    crystalcoder convert --from LLM360/CrystalCoder@REVISION --to MEGATRON
    """
    if context.invoked_subcommand is not None:
        return
    if source is None or target is None:
        raise InputError("crystalcoder convert needs --from CHECKPOINT and --to DIRECTORY")
    from megatron.crystalcoder.checkpoint.convert import DTYPES, convert
    from megatron.crystalcoder.checkpoint.hf_config import resolve_hf_config_path
    from megatron.crystalcoder.checkpoint.hub import open_source

    chosen: Any = format.value if format else None
    if chosen is None:
        # Going to Megatron, staying there at another layout, or going back.
        is_hf = open_source(source, iteration=iteration).format == "hf"
        chosen = "torch" if tp or pp or vpp or pp_layers or is_hf else "hf"
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
        iteration=iteration,
        release=release,
        dtype=DTYPES[dtype.value] if dtype else None,
        hf_config=resolve_hf_config_path(hf_config) if hf_config else None,
        tokenizer=tokenizer,
        fused_norms=transformer_engine,
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
def inspect(
    directory: Annotated[str, typer.Argument(help="a checkpoint in any format")],
    iteration: Annotated[int | None, typer.Option(min=1, help="which of a run's [default: the last]")] = None,
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="list every tensor's shape and dtype")] = True,
) -> None:
    """Tell what a checkpoint is, from its headers: format, layout, iteration, sizes, muP constants, dtypes, tensors."""
    from megatron.crystalcoder.checkpoint.diff import tensors_of
    from megatron.crystalcoder.checkpoint.hub import open_source

    checkpoint = open_source(directory, iteration=iteration)
    config, stored = checkpoint.config, tensors_of(checkpoint).stored
    own = config.unpadded
    facts: dict[str, Any] = {"format": checkpoint.format, "parameters": f"{own.num_parameters:,}"}
    if checkpoint.layout is not None:
        facts["written at"] = str(checkpoint.layout)
        facts["iteration"] = f"{checkpoint.iteration}{' (converted)' if checkpoint.is_converted else ''}"
    run = vars(checkpoint.args) if checkpoint.args else {}
    if "code_version" in run:
        facts["written by"] = run["code_version"]
        facts["samples consumed"] = f"{run['consumed_train_samples']:,}"
        facts |= {f"  of {name}": f"{samples:,}" for name, samples in run["data_drawn"].items()}
    if checkpoint.adapter is not None:
        facts["adapter"] = f"{checkpoint.adapter}; what follows is its base"
    facts["dtype"] = ", ".join(sorted({_dtype(stored[name]) for name in checkpoint.weights.names()}))
    kinds = {name.removeprefix("optimizer.state.").split(".")[0] for name in stored if name.startswith("optimizer.")}
    if kinds:
        facts["optimizer state"] = ", ".join(sorted(kinds))
    facts |= {name: value for name, value in vars(own).items() if name != "mup" and not name.startswith("unpadded_")}
    for name in ("vocab_size", "ffn_hidden_size"):
        if getattr(config, name) != facts[name]:
            facts[name] = f"{facts[name]} (padded to {getattr(config, name)})"
    if checkpoint.mup_recorded:
        facts |= {f"mup {name}": value for name, value in vars(config.mup).items()}
    else:
        facts["mup"] = "not recorded"
    for name, value in facts.items():
        print(f"{name:<26}{value}")
    if tensors:
        print()
        rows = [(name, str(list(entry.shape)), _dtype(entry)) for name, entry in stored.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        for name, shape, dtype in rows:
            print(f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype}")


def _dtype(stored: Any) -> str:
    return str(stored.dtype).removeprefix("torch.")


@app.command()
@exits_on_bad_input
def diff(
    first: Annotated[str, typer.Argument(help="a checkpoint in any format")],
    second: Annotated[str, typer.Argument(help="another, in the same or another format and layout")],
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: one a core, 4 at most]")] = None,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 0: equal bit for bit; 1: they differ; 2: cannot be read."""
    from megatron.crystalcoder.checkpoint.diff import config_differences, refuse_incomparable, tensors_of
    from megatron.crystalcoder.checkpoint.diff import diff as differences
    from megatron.crystalcoder.checkpoint.hub import open_source
    from megatron.crystalcoder.checkpoint.progress import progress_bar
    from megatron.crystalcoder.checkpoint.transfer import default_workers

    one, other = open_source(first), open_source(second)
    refuse_incomparable(one, other)
    stored = tensors_of(one).stored
    lines = [f"configuration: {line}" for line in config_differences(one, other)]
    with progress_bar(sum(entry.nbytes for entry in stored.values()), "comparing") as advance:
        found = list(differences(one, other, workers=workers or default_workers(), progress=advance))
    lines += map(str, found)
    for line in lines:
        print(line)
    if not lines:
        print(f"equal, bit for bit: {len(stored)} tensors, {one.config.unpadded.num_parameters:,} parameters")
        return
    common = sum(difference.name in stored for difference in found)
    print(f"different: {len(lines)} differences; {len(stored) - common} of {len(stored)} tensors are equal")
    raise typer.Exit(1)


def main(arguments: list[str]) -> None:
    """What `crystalcoder convert` runs."""
    app(args=arguments, prog_name="crystalcoder convert")


if __name__ == "__main__":
    app()
