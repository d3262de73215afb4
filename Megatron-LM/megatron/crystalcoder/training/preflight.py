"""Everything that can be known to be wrong before a rank starts, said with the line of the params.yaml to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.data.loader import open_data
from megatron.crystalcoder.training.accounting import open_account
from megatron.crystalcoder.training.config import SettingError, TrainConfig
from megatron.crystalcoder.training.evaluation import open_evaluation_sets
from megatron.crystalcoder.training.loop import check_sizes
from megatron.crystalcoder.training.params import Params
from megatron.crystalcoder.training.params_schema import Input
from megatron.crystalcoder.training.phases import Phase, check_order
from megatron.crystalcoder.training.resume import find_start
from megatron.crystalcoder.training.yaml_lines import KeyPath

# Settings of the trainer, and the keys that they come from.
_KEYS: dict[str, KeyPath] = {
    "global_batch_size": ("train_input", "batch_size"),
    "vocab_size": ("model", "vocab_size"),
    "hidden_size": ("model", "hidden_size"),
    "num_layers": ("model", "num_hidden_layers"),
    "num_attention_heads": ("model", "num_heads"),
    "ffn_hidden_size": ("model", "filter_size"),
    "rotary_dim": ("model", "rotary_dim"),
    "layernorm_epsilon": ("model", "layer_norm_epsilon"),
    "tie_word_embeddings": ("model", "share_embedding_weights"),
    "mup": ("model", "output_logits_scale"),
}


def check(
    phases: Sequence[Phase],
    configs: Sequence[TrainConfig],
    world_size: int,
    *,
    mode: str = "train",
    data_root: Path | None = None,
) -> None:
    """Raise InputError for what would stop a run of `phases` on `world_size` ranks. Reads headers and a few rows.

    Sizes that do not divide; data that is missing, or of another length or vocabulary; a checkpoint of another model or
    phase, or of a run with other data.
    """
    if mode != "eval":
        check_order(phases)
    for (before, first), (phase, second) in pairwise(zip(phases, configs, strict=True)):
        for name in _KEYS:
            if hasattr(first.model, name) and getattr(first.model, name) != getattr(second.model, name):
                raise InputError(
                    f"{_place(phase.params, _KEYS[name])}: differs from {before.name}, whose weights {phase.name} "
                    f"begins with ({getattr(second.model, name)}, not {getattr(first.model, name)}): make them equal"
                )
    for number, (phase, config) in enumerate(zip(phases, configs, strict=True)):
        if len(phases) > 1 and phase.is_finished:
            continue  # its data may be gone by now
        with _at_its_line(phase.params, data_root or Path()):
            check_sizes(config, world_size)
            ranks = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
            open_evaluation_sets(config, world_size // ranks)
            if mode == "eval":
                start = find_start(evaluation_config(config))
                continue
            rows, order = open_data(config.data, seq_length=config.seq_length, vocab_size=config.model.vocab_size)
            if number == 0 or phases[number - 1].is_finished:
                weights = RandomWeights(config.model, phase.params.init_settings(), phase.params.init_seed)
                start = find_start(config, weights)
                open_account(config, rows, order, start)


def evaluation_config(config: TrainConfig) -> TrainConfig:
    """`config` for evaluating `load`, or else the run in `save`: nothing is written or continued."""
    return replace(config, load=config.load or config.save, save=None, load_optimizer=False, load_rng=False)


@contextmanager
def _at_its_line(params: Params, data_root: Path) -> Iterator[None]:
    """Put the file, line and key in front of an InputError about a setting or a data directory."""
    try:
        yield
    except SettingError as error:
        keys = _KEYS.get(error.setting)
        if keys is None:
            raise
        raise InputError(f"{_place(params, keys)}: {error}") from None
    except InputError as error:
        keys = _data_key(params, data_root, str(error))
        if keys is None:
            raise
        raise InputError(f"{_place(params, keys)}: {error}") from None


def _place(params: Params, keys: KeyPath) -> str:
    return f"{params.file.place(keys)}: {'.'.join(map(str, keys))}"


def _data_key(params: Params, data_root: Path, message: str) -> KeyPath | None:
    """The key of the data directory that an error message begins with; errors begin with the path they are about."""
    sections: list[tuple[str, Input | None]] = [
        ("train_input", params.values.train_input),
        ("eval_input", params.values.eval_input),
    ]
    for section, source in sections:
        paths = (source and source.data_dir) or []
        named: list[tuple[KeyPath, str]] = [
            ((section, "data_dir", number) if len(paths) > 1 else (section, "data_dir"), path)
            for number, path in enumerate(paths)
        ]
        items = enumerate((source and source.mixture) or ())
        named += [((section, "mixture", number, "data_dir"), item.data_dir) for number, item in items]
        for keys, data_dir in named:
            path = str(data_root / data_dir)
            if message.startswith(path) and message[len(path) :][:1] in ("/", ":", " "):
                return keys
    return None
