"""`crystalcoder finetune`: prepare and show (from the finetune room), run and export.

crystalcoder finetune run data/chat --load MODEL --save runs/chat --iters 200 --tp 2 --pp 2
crystalcoder finetune export runs/chat --to HF --best
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.errors import InputError
from data_prep.tokenizer import load_tokenizer
from finetune.commands import app
from finetune.jinja import jinja_template
from finetune.prepare import PREPARE_FILE, VALID
from finetune.templates import EOS, TEMPLATE_FILE, template_beside
from tools.hf_checkpoint import SYSTEM_FILE

if TYPE_CHECKING:
    from megatron.crystalcoder.checkpoint.open import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SCRIPT = ROOT / "Megatron-LM" / "pretrain_crystalcoder_inst.py"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="what `finetune prepare` wrote")],
    load: Annotated[Path, typer.Option(help="checkpoint to start from: Hugging Face or Megatron")],
    save: Annotated[Path, typer.Option(help="where the run goes, and goes on from when started again")],
    iters: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 1600,
    lr: Annotated[float, typer.Option(help="highest learning rate; it falls to a tenth by a cosine")] = 2e-4,
    global_batch_size: Annotated[int, typer.Option(min=1, help="rows per step")] = 1024,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="rows per forward pass; the rest is accumulated")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="tensor-parallel size")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline-parallel size")] = 1,
    processes: Annotated[int | None, typer.Option(min=1, help="ranks [default: the GPUs, else TP x PP]")] = None,
    eval_interval: Annotated[
        int, typer.Option(min=0, help="steps between evaluations on DATA/valid, where there is one; 0: none")
    ] = 50,
    patience: Annotated[
        int, typer.Option(min=0, help="end after so many evaluations without a lower loss; 0: never")
    ] = 0,
    lora_rank: Annotated[int, typer.Option(min=0, help="train an adapter of this rank; 0: all weights")] = 0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="when a rank dies, go on from the last checkpoint, so many times")
    ] = 3,
) -> None:
    """Train on this machine, with the reference's hyper-parameters where not told otherwise.

    Any other flag goes to pretrain_crystalcoder_inst.py (--help there lists them); of one given twice the last counts.
    Several machines: rank_cmd_phase2.sh on each. The same command continues a run that was stopped.
    """
    facts = _prepared(data)
    settings = facts["settings"]
    # Every checkpoint records both, for `export`, which may be called from elsewhere.
    data, load = data.resolve(), load.resolve()
    ranks = processes or max(_gpus(), tp * pp)
    flags: list[Any] = ["--load", load, "--save", save, "--use-checkpoint-args", "--exit-on-missing-checkpoint"]
    flags += ["--data-path", data, "--seq-length", settings["max_seq_length"], "--dataloader-type", "shuffled"]
    flags += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp, "--sequence-parallel"]
    flags += ["--micro-batch-size", micro_batch_size, "--global-batch-size", global_batch_size, "--seed", 42]
    flags += ["--train-iters", iters, "--lr", lr, "--min-lr", lr / 10, "--lr-decay-style", "cosine"]
    flags += ["--lr-warmup-fraction", 0.001, "--weight-decay", 0.1, "--clip-grad", 1.0, "--save-interval", 100]
    flags += ["--adam-beta1", 0.9, "--adam-beta2", 0.95, "--adam-eps", 1e-8]
    if settings["packing"] == "best-fit":
        flags.append("--isolate-documents")
    if patience and not eval_interval:
        raise InputError("--patience counts evaluations, and --eval-interval 0 makes none: drop one of them")
    if VALID in facts and eval_interval:
        flags += ["--valid-data-path", data / VALID, "--eval-interval", eval_interval, "--keep-best"]
        if patience:
            flags += ["--early-stop-patience", patience]
    elif patience:
        raise InputError(f"{data}: holds no {VALID} rows to stop by: prepare it with --valid, or drop --patience")
    if lora_rank:
        flags += ["--lora-rank", lora_rank]
    if _gpus():
        flags.append("--bf16")
    command = [sys.executable, "-m", "megatron.crystalcoder.training.launch", "--nproc-per-node", str(ranks)]
    command += ["--standalone", "--max-restarts", str(max_restarts), str(SCRIPT), *map(str, flags), *context.args]
    path = os.pathsep.join([str(ROOT / "Megatron-LM"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    raise SystemExit(
        subprocess.run(command, env={**environment, **os.environ, "PYTHONPATH": path}, check=False).returncode
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _prepared(data: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((data / PREPARE_FILE).read_text())
    except (OSError, ValueError):
        raise InputError(f"{data}: holds no {PREPARE_FILE}: make it with `crystalcoder finetune prepare`") from None
    return facts


@app.command()
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="the --save of a run")],
    to: Annotated[Path, typer.Option(help="Hugging Face directory to write; must not exist yet")],
    best: Annotated[bool, typer.Option("--best", help="the checkpoint of the lowest evaluation loss")] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json, or a folder of tokenizer files [default: those that the run began with]"),
    ] = None,
) -> None:
    """Write a run's model as a Hugging Face directory; an adapter is merged, and also stands in TO/adapter for PEFT."""
    from megatron.crystalcoder.checkpoint.adapter import ADAPTER, merge_into, read_adapter
    from megatron.crystalcoder.checkpoint.companions import TOKENIZER_FILES, tokenizer_files
    from megatron.crystalcoder.checkpoint.convert import convert
    from megatron.crystalcoder.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(run_directory / "best" if best else run_directory)
    began = _began(checkpoint)
    if to.exists():
        raise InputError(f"{to}: exists already: choose another --to")
    given: dict[str, Path] = {}
    if tokenizer is not None:
        given = tokenizer_files(tokenizer)
    elif "load" in began and Path(began["load"]).is_dir():
        carried = open_checkpoint(began["load"]).hf_files
        given = {name: carried / name for name in TOKENIZER_FILES if carried and (carried / name).is_file()}
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if checkpoint.adapter is None:
            convert(checkpoint.path, partial, format="hf", report=lambda line: None)
        else:
            base = vars(checkpoint.args)["lora"]["base"]
            convert(Path(base), partial, format="hf", report=lambda line: None)
            merge_into(partial, read_adapter(checkpoint.adapter, checkpoint.config))
            shutil.copytree(checkpoint.adapter, partial / ADAPTER)
        if given:  # of one tokenizer, not parts of two
            for name in {*TOKENIZER_FILES} - {CHAT_TEMPLATE_FILE}:
                (partial / name).unlink(missing_ok=True)
        for name, file in given.items():
            shutil.copyfile(file, partial / name)
        if "data" in began:
            _write_chat_format(partial, Path(began["data"]))
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    merged = ", its adapter merged" if checkpoint.adapter else ""
    print(f"{to}: iteration {checkpoint.iteration} of {checkpoint.path}{merged}; talk to it: crystalcoder chat {to}")
    if not (to / "tokenizer.json").is_file():
        print(f"note: no tokenizer is known of this run, so {to} has none; give --tokenizer, or add its files")


def _write_chat_format(folder: Path, data: Path) -> None:
    """What the model was asked in: for `crystalcoder chat`, for `apply_chat_template`, and where an answer ends.

    A tokenizer.json alone does not say which of its tokens begin and end a text: tokenizer_config.json is added to it.
    """
    from CrystalCoder.build_tokenizer import tokenizer_config

    if (data / TEMPLATE_FILE).is_file():
        shutil.copyfile(data / TEMPLATE_FILE, folder / TEMPLATE_FILE)
    if (data / PREPARE_FILE).is_file():
        (folder / SYSTEM_FILE).write_text(_prepared(data)["settings"]["system"], encoding="utf-8")
    if not (folder / "tokenizer.json").is_file():
        return
    template, tokenizer = template_beside(data), load_tokenizer(folder)
    (folder / CHAT_TEMPLATE_FILE).write_text(jinja_template(template, sorted(tokenizer.controls)), encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer.controls))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.controls[token] for token in dict.fromkeys((EOS, *template.stops))]
    _write_json(folder / "generation_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _began(checkpoint: Checkpoint) -> dict[str, str]:
    """The data and the model that a run began with, as its checkpoint records them."""
    recorded = json.loads(getattr(checkpoint.args, "run_config", "{}"))
    began = {"load": recorded["load"]} if recorded.get("load") else {}
    if len(paths := recorded.get("data", {}).get("paths", ())) == 1:
        began["data"] = paths[0]
    return began


def main(arguments: list[str]) -> None:
    """The `crystalcoder finetune` subcommand."""
    app(args=arguments, prog_name="crystalcoder finetune")
