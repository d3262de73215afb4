"""Open a Hugging Face checkpoint directory of a CrystalCoder, with one clear line when it is not one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Beside an exported model: the system prompt that its conversations got where they had none of their own.
SYSTEM_FILE = "system_prompt.txt"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


class Dtype(StrEnum):
    """The number format to compute in; auto is the one that the checkpoint is stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Directory = Annotated[Path, typer.Argument(help="a Hugging Face checkpoint directory, tokenizer included")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...: the GPU if there is one, else the CPU")]
DtypeOption = Annotated[Dtype, typer.Option(help="number format to compute in; auto: as stored")]


def load_checkpoint(directory: Path, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """The model, ready to answer, and its tokenizer. No code from the directory is run.

    device: None takes the GPU if there is one. dtype: a name of `Dtype`.

    Raises:
        InputError: the directory is missing, not a CrystalCoder checkpoint, damaged, or without a tokenizer.
    """
    directory = Path(directory)
    require_files(directory)

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import CrystalCoder

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of missing tensors is said below, in one line
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used ({_first_line(error)}): try cpu") from None
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}/config.json: cannot be read ({_first_line(error)})") from None
    if not isinstance(config, CrystalCoder.CrystalCoderConfig):
        raise InputError(f"{directory}/config.json: is a {config.model_type} model, not a CrystalCoder")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        model, report = loaded
    except Exception as error:  # noqa: BLE001 - each weight format has its own errors for a damaged file
        raise InputError(f"{directory}: its weights cannot be read ({_first_line(error)}): copy them again") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{directory}: its weights lack {len(missing)} tensors, {missing[0]} first: copy them again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        raise InputError(f"{directory}: its tokenizer cannot be read ({_first_line(error)})") from None
    for name, token in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")):
        if getattr(tokenizer, name) is None:  # a tokenizer.json without tokenizer_config.json
            setattr(tokenizer, name, token)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {len(tokenizer)} ids, the model only {config.vocab_size}: "
            "it is another model's tokenizer"
        )
    return model.to(target).eval(), tokenizer


def require_files(directory: Path) -> None:
    """What can be told before the seconds that importing torch takes."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory: name a Hugging Face checkpoint directory")
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory}: holds no config.json, so it is not a Hugging Face checkpoint "
            "(crystalcoder convert makes one from a Megatron checkpoint)"
        )
    if not any(path for pattern in WEIGHT_FILES for path in directory.glob(pattern)):
        raise InputError(f"{directory}: holds no weights (*.safetensors or pytorch_model*.bin)")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{directory}: holds no tokenizer.json: build one there with python -m CrystalCoder.build_tokenizer"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
