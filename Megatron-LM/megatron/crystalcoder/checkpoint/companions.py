"""What stands beside the weights: config.json, generation_config.json, tokenizer, chat template, the model's code."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.hf_config import from_hf, hf_values, packaged_directory, read_json
from megatron.crystalcoder.checkpoint.hf_writer import write_json
from megatron.crystalcoder.checkpoint.model_card import CARD
from megatron.crystalcoder.checkpoint.open import Checkpoint
from megatron.crystalcoder.model.config import ModelConfig

_CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    _CHAT_TEMPLATE,
)
_GENERATION_CONFIG = "generation_config.json"
COMPANIONS = ("config.json", _GENERATION_CONFIG, *TOKENIZER_FILES, CARD)


def settle_config(checkpoint: Checkpoint, hf_config: Path | None) -> tuple[ModelConfig, dict[str, Any]]:
    """What the model is, and the template for the config.json keys that a checkpoint does not tell.

    The checkpoint's own record always counts. The packaged config.json (the 7B model's) is a template for any model. A
    config.json of the user's speaks of this very model, so it must not contradict the checkpoint. Only where the
    checkpoint does not record muP (the reference's converter) do the constants come from config.json, which must then
    be that of a model of the same sizes.
    """
    packaged = read_json(packaged_directory() / "config.json")
    carried = read_json(checkpoint.hf_files / "config.json") if checkpoint.hf_files else {}
    if hf_config is None:
        if not checkpoint.mup_recorded:
            raise InputError(
                f"{checkpoint.path}: does not record the muP constants: pass the Hugging Face directory of this model "
                "(its config.json has them) as --hf-config-path (crystalcoder convert: --hf-config)"
            )
        return checkpoint.config, packaged | carried
    given = read_json(hf_config / "config.json")
    if checkpoint.mup_recorded and given == packaged:
        return checkpoint.config, packaged | carried
    described = from_hf(given, hf_config / "config.json")
    recorded = checkpoint.config
    if not checkpoint.mup_recorded:
        recorded = replace(recorded, mup=described.mup, layernorm_epsilon=described.layernorm_epsilon)
    theirs = hf_values(described)
    for key, value in hf_values(recorded).items():
        # Rotary has no table of positions, so that length is a habit and no property of the weights.
        if key != "n_positions" and theirs[key] != value:
            raise InputError(
                f"{hf_config / 'config.json'}: says {key} {theirs[key]}, but {checkpoint.path} has "
                f"{value}: pass the config.json of this model"
                + (" (the muP constants are taken from it)" if not checkpoint.mup_recorded else ", or none")
            )
    return recorded, packaged | carried | given


def config_json(config: ModelConfig, template: dict[str, Any]) -> dict[str, Any]:
    """config.json's content: what the model decides, the packaged code's names, and the template for all else."""
    packaged = read_json(packaged_directory() / "config.json")
    code = {key: packaged[key] for key in ("model_type", "architectures", "auto_map")}
    return {**packaged, **template, **hf_values(config), **code}


def companion_files(checkpoint: Checkpoint, hf_config: Path | None, tokenizer: Path | None) -> dict[str, Path]:
    """Tokenizer files and generation_config.json that go with the weights, by the names they get.

    They come from the --hf-config-path directory, else from what the checkpoint carries, else from the package; the
    first that has a tokenizer counts. tokenizer: a directory or file that is to be the tokenizer instead. Raises
    InputError when it is none.
    """
    found: dict[str, Path] = {}
    for directory in (hf_config, checkpoint.hf_files, packaged_directory()):
        if directory is not None and (found := _files_in(directory, TOKENIZER_FILES)):
            found |= _files_in(directory, (_GENERATION_CONFIG,))
            break
    if tokenizer is None:
        return found
    return tokenizer_files(tokenizer) | {name: path for name, path in found.items() if name == _GENERATION_CONFIG}


def tokenizer_files(tokenizer: Path) -> dict[str, Path]:
    """The files of a tokenizer, a directory of them or one of them, by the names they get. InputError if it is none."""
    if tokenizer.is_dir():
        given = _files_in(tokenizer, TOKENIZER_FILES)
    else:
        known = {".json": "tokenizer.json", ".model": "tokenizer.model"}.get(tokenizer.suffix)
        given = {known: tokenizer} if known and tokenizer.is_file() else {}
    if not given:
        raise InputError(
            f"{tokenizer}: is no tokenizer: give a directory with tokenizer.json or tokenizer.model, or one such file"
        )
    return given


def _files_in(directory: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: directory / name for name in names if (directory / name).is_file()}


def write_companions(
    target: Path, config: ModelConfig, template: dict[str, Any], files: Mapping[str, Path], dtype: torch.dtype
) -> None:
    """config.json, generation_config.json and tokenizer files. files: see `companion_files`."""
    content = config_json(config, template) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(target / "config.json", content)
    generation = {"_from_model_config": True}
    generation |= {key: content[key] for key in ("bos_token_id", "eos_token_id") if key in content}
    write_json(target / _GENERATION_CONFIG, generation)
    for name, path in files.items():
        shutil.copyfile(path, target / name)


def write_code(target: Path) -> None:
    """The packaged model's code, so that the directory runs where this project is not installed.

    A tokenizer with CrystalCoder's control tokens and no chat template gets the packaged one: readers that do not run
    the tokenizer's code find it in no other place.
    """
    for file in packaged_directory().glob("*_crystalcoder*.py"):
        shutil.copyfile(file, target / file.name)
    tokenizer, settings = target / "tokenizer.json", target / "tokenizer_config.json"
    if not tokenizer.is_file() or (target / _CHAT_TEMPLATE).is_file():
        return
    if settings.is_file() and read_json(settings).get("chat_template"):
        return
    if '"<|sys_start|>"' in tokenizer.read_text():
        (target / _CHAT_TEMPLATE).write_text(_packaged_chat_template())


def _packaged_chat_template() -> str:
    """CHAT_TEMPLATE of the tokenizer's code, from its constants alone: to import it is to import transformers.

    That takes seconds, and transformers warns of whatever else is installed.
    """
    code = ast.parse((packaged_directory() / "tokenization_crystalcoder_fast.py").read_text())
    constants: dict[str, Any] = {}
    assignments: list[ast.stmt] = [node for node in code.body if isinstance(node, ast.Assign)]
    exec(compile(ast.Module(assignments, []), "constants", "exec"), constants)
    return str(constants["CHAT_TEMPLATE"])
