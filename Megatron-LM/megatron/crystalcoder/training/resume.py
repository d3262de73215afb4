"""Where a run starts from: its own last checkpoint, somebody's weights, or new ones. Decided before any building."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.directory import TRACKER
from megatron.crystalcoder.checkpoint.open import Checkpoint, open_checkpoint
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.model.lora import LoraSettings
from megatron.crystalcoder.training.config import SettingError, TrainConfig


@dataclass(frozen=True)
class Progress:
    """How far a run is. The schedule and the data order are functions of it, so nothing else is stored for them."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Start:
    """The weights to begin with and, when a run continues, the checkpoint that holds the rest of its state."""

    origin: str  # for people to read
    weights: WeightSource
    progress: Progress = Progress()
    checkpoint: Checkpoint | None = None
    load_optimizer: bool = False
    load_rng: bool = False


def find_start(config: TrainConfig, initial_weights: WeightSource | None = None) -> Start:
    """What the run starts from, the first of these that exists:

    1. a run's checkpoint in `config.save`: the run goes on (`config.finetune` speaks of `config.load` alone);
    2. the checkpoint in `config.load`: if a run wrote it, that run goes on, unless `config.finetune`; anything else
       (converted, Hugging Face, the reference's) gives its weights to a run that begins at iteration 0 with every row;
    3. `initial_weights`.

    Without `config.load_optimizer` / `load_rng`, Adam's moments / the random state are left behind; iteration, schedule
    and data position go on. Raises InputError when nothing is there, or what is there contradicts `config`.
    """
    if config.save is not None and config.save != config.load and (config.save / TRACKER).is_file():
        saved = open_checkpoint(config.save)
        if is_run(saved):
            return _go_on(config, saved)
    if config.load is not None and (has_checkpoint(config.load) or initial_weights is None):
        loaded = open_checkpoint(config.load)
        if loaded.adapter is not None and config.finetune:
            raise InputError(f"{config.load}: trained an adapter: export it (crystalcoder finetune export), load that")
        if is_run(loaded) and not config.finetune:
            return _go_on(config, loaded)
        refuse_other_model(config.model, loaded)
        return Start(f"iteration 0, with the weights of {config.load} ({loaded.format})", loaded.weights)
    if config.load is not None and config.exit_on_missing_checkpoint:
        open_checkpoint(config.load)  # says what is missing
    if initial_weights is None:
        raise InputError("no weights to start from: give --load a checkpoint or a Hugging Face directory")
    return Start("iteration 0, with new random weights", initial_weights)


def has_checkpoint(path: Path) -> bool:
    """Whether there is something to open at `path`, be it whole or not."""
    return (path / TRACKER).is_file() or (path / "config.json").is_file()


def is_run(checkpoint: Checkpoint) -> bool:
    """Whether a training run of this project wrote it, as opposed to a converter or another trainer."""
    return hasattr(checkpoint.args, "data_fingerprint")


def _go_on(config: TrainConfig, checkpoint: Checkpoint) -> Start:
    refuse_other_model(config.model, checkpoint)
    _refuse_other_padding(config.model, checkpoint)
    _refuse_other_adapter(config, checkpoint)
    if config.load_optimizer:
        _refuse_other_optimizer(config, checkpoint)
    assert checkpoint.args is not None
    return Start(
        f"iteration {checkpoint.iteration} of {checkpoint.path}",
        checkpoint.weights,
        Progress(checkpoint.iteration, checkpoint.args.consumed_train_samples),
        checkpoint,
        load_optimizer=config.load_optimizer,
        # Random states belong to ranks: those of another layout mean nothing here, and conversion leaves them out.
        load_rng=config.load_rng
        and _same_layout(config, checkpoint)
        and getattr(checkpoint.args, "has_rng_state", True),
    )


def refuse_other_model(model: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise InputError when the checkpoint records another model than the one configured.

    The longest sequence may differ: rotary positions have no table that it would have to fit. So may padding.
    """
    model, theirs = model.unpadded, checkpoint.config.unpadded
    names = ["vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "rotary_dim"]
    names += ["rotary_base", "layernorm_epsilon", "tie_word_embeddings"]
    if checkpoint.mup_recorded:
        names += ["rotary_interleaved", "mup"]
    for name in names:
        ours, recorded = getattr(model, name), getattr(theirs, name)
        if ours != recorded:
            raise SettingError(
                name,
                f"{checkpoint.path}: the checkpoint records {name} {recorded}, but {ours} is asked for: "
                "change that setting, or load another checkpoint",
            )


def _refuse_other_padding(model: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise InputError when a run would go on with other stored sizes: its moments have those it began with."""
    for name, remedy in (("ffn_hidden_size", "--ffn-multiple-of as the run began"), ("vocab_size", "the same")):
        ours, recorded = getattr(model, name), getattr(checkpoint.config, name)
        if ours != recorded:
            raise InputError(
                f"{checkpoint.path}: this run has {name} {recorded}, padding included, but would go on with {ours}: "
                f"give {remedy}"
            )


def _refuse_other_adapter(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise InputError when a run that trained an adapter would go on without it, or the reverse, or with another."""
    recorded = getattr(checkpoint.args, "lora", None)
    theirs = LoraSettings(recorded["rank"], recorded["alpha"], tuple(recorded["targets"])) if recorded else None
    if theirs != config.lora:
        said = (
            f"trains an adapter: give --lora-rank {theirs.rank} --lora-alpha {theirs.alpha:g} --lora-target-modules "
            f"{' '.join(theirs.targets)}"
            if theirs
            else "trains all weights: drop --lora-rank"
        )
        raise InputError(f"{checkpoint.path}: this run {said}, or begin another in a new --save")


def _same_layout(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    return (checkpoint.tensor_parallel, checkpoint.pipeline_parallel) == (
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
    )


def _refuse_other_optimizer(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise InputError for optimizer state that cannot be read into this run's optimizer."""
    facts = vars(checkpoint.args)
    remedy = "or leave Adam's moments behind with --no-load-optim"
    if facts["bf16"] != config.bf16:
        dtype = "bf16" if facts["bf16"] else "fp32"
        raise InputError(f"{checkpoint.path}: the optimizer state is of a {dtype} run: resume in {dtype}, {remedy}")
    if facts["use_distributed_optimizer"] != config.parallel.use_distributed_optimizer:
        found = "with" if facts["use_distributed_optimizer"] else "without"
        raise InputError(
            f"{checkpoint.path}: the optimizer state was saved {found} the distributed optimizer: "
            f"resume {found} --use-distributed-optimizer, {remedy}"
        )
    if checkpoint.format == "torch" and not _same_layout(config, checkpoint):
        raise InputError(
            f"{checkpoint.path}: in format torch, optimizer state resumes only at the TP {checkpoint.tensor_parallel} "
            f"and PP {checkpoint.pipeline_parallel} that saved it: resume at those (torch_dist does at any), {remedy}"
        )
