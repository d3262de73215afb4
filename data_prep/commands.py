"""`crystalcoder data …`: the command line of each step. What a step does is in the module that it calls."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_prep.engine import run_on, stay_one_thread
from data_prep.errors import InputError, exit_on_bad_input
from data_prep.manifest import report

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="Folder to write")]
Processes = Annotated[int, typer.Option(help="Processes; the output does not depend on it")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete what --out holds from other settings")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option("--engine-option", help="For slurm and ray: partition=NAME, time=HH:MM:SS, account=NAME, address=…"),
]
TokenizerFile = Annotated[Path, typer.Option(help="tokenizer.json, SentencePiece .model, or a folder with one")]


class EngineKind(StrEnum):
    """What runs a step's tasks."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


class OnError(StrEnum):
    """What to do at a bad record."""

    stop = "stop"
    skip = "skip"


class Corpus(StrEnum):
    """What `download` knows."""

    slimpajama = "slimpajama"
    starcoderdata = "starcoderdata"
    crystalcoder_datasets = "crystalcoder-datasets"


class CutLevel(StrEnum):
    """Where FIM cuts."""

    char = "char"
    token = "token"


Engine = Annotated[EngineKind, typer.Option(help="Run the tasks here, as a Slurm array, or on Ray")]


def main(arguments: list[str]) -> None:
    """Run one `crystalcoder data` command; returns when it is done.

    Modules that take their time are loaded by the commands that need them.

    Raises:
        InputError: bad input.
        SystemExit: a command line that is not understood (2).
    """
    stay_one_thread()
    try:
        app(args=arguments, prog_name="crystalcoder data")
    except SystemExit as done:  # typer ends so in any case
        if done.code:
            raise


def run(command: str, arguments: list[str] | None = None) -> None:
    """Run `command` from a script of its own: bad input is one line and exit code 2."""
    with exit_on_bad_input():
        main([command, *(sys.argv[1:] if arguments is None else arguments)])


@app.command()
def download(
    corpus: Annotated[Corpus, typer.Argument(help="Which corpus")],
    out: Out,
    include: Annotated[list[str] | None, typer.Option(help="Only paths like this: 'python/*'; repeatable")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the corpus")] = "main",
) -> None:
    """Fetch a public corpus from the Hugging Face hub; a relaunch goes on. HF_TOKEN opens gated ones."""
    from data_prep.download import download as fetch

    print(f"{out}: {fetch(corpus.value, out, include or (), revision)} files, checksums right")


@app.command()
def parquet2jsonl(
    source: Annotated[Path, typer.Argument(help="Folder of <language>/*.parquet")],
    out: Out,
    on_error: Annotated[
        OnError, typer.Option(help="At a bad row or damaged file: stop, or skip and list it")
    ] = OnError.stop,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Convert parquet to JSON lines, the column `content` renamed `text`."""
    from data_prep.parquet2jsonl import parquet_to_jsonl

    with run_on(engine.value, engine_option or ()):
        manifest = parquet_to_jsonl(
            _existing(source), out, on_error=on_error.value, processes=processes, overwrite=overwrite
        )
        report(out, manifest)


@app.command()
def partition(
    inputs: Annotated[list[str], typer.Argument(help="Files or folders of jsonl, jsonl.gz, jsonl.zst")],
    out: Out,
    key: Annotated[str | None, typer.Option(help="Sort by the value of this key: meta.redpajama_set_name")] = None,
    valid: Annotated[float, typer.Option(min=0, max=1, help="Share of the documents to hold out, in OUT/valid")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the choice")] = 0,
    on_error: Annotated[OnError, typer.Option(help="At a bad record: stop, or skip and list it")] = OnError.stop,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    r"""Sort documents into folders: OUT/\[train|valid]/\[<value of the key>]/<input name>.jsonl.zst."""
    from data_prep.partition import PartitionOptions
    from data_prep.partition import partition as partition_files

    options = PartitionOptions(key, valid, seed, on_error.value)
    with run_on(engine.value, engine_option or ()):
        report(out, partition_files(inputs, out, options, processes=processes, overwrite=overwrite))


@app.command()
def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or URLs: parquet, jsonl, jsonl.zst, json, txt")],
    out: Out,
    tokenizer: TokenizerFile,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Positions of a sequence")] = 2048,
    text_key: Annotated[str | None, typer.Option(help=r"Key of the text \[text; parquet: also content]")] = None,
    text_suffixes: Annotated[str, typer.Option(help="Files that are one document each: .py,.js")] = "",
    fim_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of documents to transform with FIM before packing")
    ] = 0.0,
    fim_spm_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of these in the order suffix-prefix-middle")
    ] = 0.5,
    fim_level: Annotated[CutLevel, typer.Option(help="Cut between characters or tokens")] = CutLevel.char,
    epochs: Annotated[
        int, typer.Option(min=0, help="Write the corpus so often, to OUT/epoch_<e>, with other FIM cuts")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the FIM cuts")] = 0,
    ftfy: Annotated[
        bool, typer.Option("--ftfy", help="Repair texts with ftfy first (for prose; it changes code)")
    ] = False,
    ftfy_normalizer: Annotated[str, typer.Option(help="Its normal form: NFC, NFKC, NFD, NFKD or none")] = "NFC",
    wikitext_detokenize: Annotated[
        bool, typer.Option("--wikitext-detokenize", help="Undo the spaces that WikiText puts around marks")
    ] = False,
    min_sequence_len: Annotated[int, typer.Option(min=0, help="Leave a shard's end out if it has fewer tokens")] = 2,
    pad_id: Annotated[int | None, typer.Option(help="Fills the last sequence of a shard [</s>]")] = None,
    output_name: Annotated[str, typer.Option(help="What the names of the files begin with")] = "examples",
    on_error: Annotated[OnError, typer.Option(help="At a bad record: stop, or skip and list it")] = OnError.stop,
    rows_per_file: Annotated[int, typer.Option(min=1, help="Sequences of an HDF5 file at most")] = 50_000,
    shard_mb: Annotated[
        int | None,
        typer.Option(min=0, help="Input files are packed together up to about this size [1 to 16, by the corpus]"),
    ] = None,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Tokenise and pack documents into sequences, with FIM per document if --fim-rate is given."""
    from data_prep.cleaning import Cleaning, normal_form
    from data_prep.fim import FimSettings
    from data_prep.tokenize_corpus import TokenizeOptions, tokenize_corpus

    options = TokenizeOptions(
        tokenizer=str(tokenizer),
        max_seq_length=max_seq_length,
        fim=FimSettings(fim_rate, fim_spm_rate, seed, fim_level.value) if fim_rate else None,
        epochs=epochs,
        text_key=text_key,
        text_suffixes=tuple(filter(None, text_suffixes.split(","))),
        on_error=on_error.value,
        rows_per_file=rows_per_file,
        output_name=output_name,
        pad_id=pad_id,
        min_sequence_len=min_sequence_len,
        cleaning=Cleaning(ftfy, normal_form("--ftfy-normalizer", ftfy_normalizer), wikitext_detokenize),
        shard_bytes=None if shard_mb is None else shard_mb << 20,
    )
    with run_on(engine.value, engine_option or ()):
        report(out, tokenize_corpus(inputs, out, options, processes=processes, overwrite=overwrite))


@app.command()
def fim(
    source: Annotated[Path, typer.Argument(help="Folder of packed sequences, *.h5")],
    out: Out,
    tokenizer: TokenizerFile,
    rate: Annotated[float, typer.Option(min=0, max=1, help="Share of texts to transform")],
    spm_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of these in the order suffix-prefix-middle")
    ] = 0.5,
    epochs: Annotated[int, typer.Option(min=1, help="Transform the data so often, each time with other cuts")] = 1,
    level: Annotated[CutLevel, typer.Option(help="Cut between characters or tokens")] = CutLevel.char,
    seed: Annotated[int, typer.Option(help="Seed of the cuts")] = 0,
    reference_compat: Annotated[
        bool, typer.Option("--reference-compat", help="The reference's arrays, quirks included; --processes matters")
    ] = False,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Fill in the middle on packed sequences: writes OUT/epoch_<e>/<input file name>."""
    from data_prep.fim import FimSettings
    from data_prep.fim_files import FimSource, fim_files

    with run_on(engine.value, engine_option or ()):
        manifest = fim_files(
            [FimSource(source)],
            out,
            tokenizer,
            FimSettings(rate, spm_rate, seed, level.value),
            epochs=epochs,
            processes=processes,
            overwrite=overwrite,
            reference_groups=processes if reference_compat else None,
        )
    report(out, manifest)


@app.command()
def shuffle(
    inputs: Annotated[list[Path], typer.Argument(help="Folders or files of sequences; folders with all below them")],
    out: Out,
    files: Annotated[int, typer.Option(min=1, help="How many files to write: OUT/data-00000.h5 …")],
    seed: Annotated[int, typer.Option(help="Seed of the order")] = 0,
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Put all sequences of all inputs into one random order."""
    from data_prep.shuffle import shuffle as shuffle_files

    with run_on(engine.value, engine_option or ()):
        manifest = shuffle_files(inputs, out, files=files, seed=seed, processes=processes, overwrite=overwrite)
    report(out, manifest)


@app.command()
def split(folders: Annotated[list[Path], typer.Argument(help="Folders of sequences")]) -> None:
    """Split folders into halves by even and odd file number: links in DIR_part0of2 and DIR_part1of2."""
    from data_prep.split import split_by_parity

    for folder in folders:
        for half in split_by_parity(folder):
            print(f"{half}: {len(list(half.iterdir()))} files")


@app.command()
def subset(
    source: Annotated[Path, typer.Argument(help="Folder of sequences, *.h5")],
    out: Out,
    ranges: Annotated[str, typer.Option(help="Fractions of its rows to keep: 0.0-0.1 or 0.0-0.1,0.5-1.0")],
    processes: Processes = 1,
    overwrite: Overwrite = False,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Copy stretches of a folder's rows, as `data_subset` in a params.yaml names them."""
    from data_prep.subset import write_subset

    with run_on(engine.value, engine_option or ()):
        report(out, write_subset(source, out, ranges, processes=processes, overwrite=overwrite))


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a shipped one's name: crystalcoder_phase1, 2, 3")],
    root: Annotated[Path, typer.Option(help="Folder that the recipe's paths are relative to")] = Path(),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps with sizes, and run none")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe: name=value")
    ] = None,
    processes: Processes = 1,
    engine: Engine = EngineKind.local,
    engine_option: EngineOptions = None,
) -> None:
    """Run all steps of a recipe, from raw folders to those of a phase; a relaunch goes on."""
    from data_prep.build import build as run_recipe

    values = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: is not name=value")
        values[name] = value
    with run_on(engine.value, engine_option or ()):
        run_recipe(recipe, root, processes=processes, values=values, dry_run=dry_run)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A sequence file, or a folder")],
    tokenizer: Annotated[Path | None, typer.Option(help="Decode samples with this tokenizer")] = None,
    sample: Annotated[list[int] | None, typer.Option(help="Sequences of the first file to decode [0]")] = None,
) -> None:
    """Show layout, statistics and, with a tokenizer, decoded sequences with the loss mask in colour."""
    from rich.console import Console

    from data_prep.inspection import show
    from data_prep.tokenizer import load_tokenizer

    if sample and not tokenizer:
        raise InputError(f"--sample {sample[0]}: name the --tokenizer to decode it with")
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    show(path, loaded, samples=sample, console=Console(highlight=False))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A folder that a step wrote, or any sequences")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Ids must be below this")] = None,
) -> None:
    """Prove the sequences: layout, labels, loss mask, ids, and files, counts and checksums against the manifest."""
    from data_prep.verification import verify as find_faults

    faults = find_faults(path, vocab_size)
    for fault in faults:
        print(fault)
    if faults:
        raise SystemExit(1)
    print(f"{path}: nothing wrong")


@app.command()
def locate(
    path: Annotated[Path, typer.Argument(help="A sequence file, or a folder (its files in order)")],
    row: Annotated[int, typer.Argument(help="Number of the sequence, from 0")],
    characters: Annotated[int, typer.Option(min=0, help="How much of each document to print; 0 for none")] = 300,
) -> None:
    """Print the source documents of one sequence."""
    from data_prep.inspection import locate as locate_row

    for span, text in locate_row(path, row):
        print(f"{span.path} document {span.document}, from its token {span.start} on")
        if text is None and characters:
            print("    (the file is not here)")
        elif text and characters:
            print("    " + text[:characters].replace("\n", "\n    "))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return path
