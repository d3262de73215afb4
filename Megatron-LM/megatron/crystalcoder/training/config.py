"""The one configuration that both front doors (Megatron flags, params.yaml) fill and the loop reads. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.lora import LoraSettings
from megatron.crystalcoder.training.memory import OptimizerStates


class SettingError(InputError):
    """A value of `TrainConfig` or its `ModelConfig` is wrong; `setting` names it, for who knows where it came from."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (decoupled decay) and gradient clipping.

    hidden_lr_scale multiplies the lr (and min lr) of the hidden linear layers' weights; of their biases too if
    scale_hidden_biases is set, as the instruction-tuning reference does (the pretraining one scales weights only).
    Weight decay applies to matrices only: never to biases or LayerNorm.
    eps_before_correction adds eps before the bias correction, m / (sqrt(v) + eps) * sqrt(1 - beta2^t) / (1 - beta1^t),
    as the pretraining reference does, instead of to the corrected root.
    states: what the moments are kept in between the steps (moments.py).
    """

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    hidden_lr_scale: float = 1.0
    scale_hidden_biases: bool = True
    eps_before_correction: bool = False
    states: OptimizerStates = "fp32"


@dataclass(frozen=True)
class WarmupDecay:
    """Megatron's schedule, counted in samples: linear warm-up from 0 to lr, then decay to min_lr."""

    lr: float
    min_lr: float
    warmup_samples: float
    decay_samples: float
    style: Literal["constant", "linear", "cosine"] = "cosine"


@dataclass(frozen=True)
class ScheduleSegment:
    """One entry of a params.yaml `learning_rate` list; counts steps from its own start.

    Exponential alone has decay_rate (the factor over `steps`) and staircase (in whole powers), Polynomial alone power.
    """

    scheduler: Literal["Linear", "CosineDecay", "Constant", "Exponential", "Polynomial"]
    initial: float
    end: float
    steps: int
    decay_rate: float = 1.0
    staircase: bool = False
    power: float = 1.0


@dataclass(frozen=True)
class PiecewiseSchedule:
    """Schedulers one after the other, counted in steps; the last one's end holds for ever."""

    segments: tuple[ScheduleSegment, ...]


Schedule = WarmupDecay | PiecewiseSchedule


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture. subset: (start, end) fractions of its rows."""

    data_dir: Path
    weight: float
    subset: tuple[tuple[float, float], ...] = ((0.0, 1.0),)


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from and in which order they are seen.

    paths: HDF5 sequence files, directories of them, or processed JSONL files; or `mixture` instead.
    order: cyclic (the reference's sampler, exactly), single (sequential), shuffled (fresh permutation per epoch from
    the seed), mixture (see data/mixture.py; implied by `mixture`).
    reference_order: as the pretraining reference's data loader saw them (see data/reference_order.py); `order` then
    only says whether it shuffled.
    """

    paths: tuple[Path, ...] = ()
    mixture: tuple[MixtureEntry, ...] = ()
    order: Literal["cyclic", "single", "shuffled", "mixture"] = "shuffled"
    seed: int = 1
    data_sharding: bool = True
    num_workers: int = 0
    # For rows of whole documents: attention within each, positions from 0 in each (data/isolation.py).
    isolate_documents: bool = False
    reference_order: bool = False


@dataclass(frozen=True)
class ProfileSettings:
    """Steps `first` to `last`, both included, are traced on `ranks` (None: on all); the traces go to `folder`."""

    first: int
    last: int
    folder: Path
    ranks: frozenset[int] | None = frozenset({0})


@dataclass(frozen=True)
class TrainConfig:
    """Everything one run needs to know."""

    model: ModelConfig
    data: DataSettings
    schedule: Schedule
    train_iters: int
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    speed: Speed = field(default_factory=Speed)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    bf16: bool = False
    # token: every unmasked token of the global batch weighs the same. micro_batch: mean over micro-batches of their
    # token mean (the instruction-tuning reference). sequence: sum over tokens / sequences * loss_weight (pretraining).
    loss_reduction: Literal["token", "micro_batch", "sequence"] = "token"
    loss_weight: float = 1.0
    skip_nonfinite: bool = False
    seed: int = 1234
    phase: int | None = None  # of pretraining; recorded in checkpoints

    load: Path | None = None
    save: Path | None = None
    save_interval: int = 0  # 0: only at the end
    save_format: Literal["torch_dist", "torch"] = "torch_dist"
    load_optimizer: bool = True
    load_rng: bool = True
    lora: LoraSettings | None = None  # train an adapter beside frozen weights
    finetune: bool = False  # weights only: iteration, schedule and data position start at 0
    new_data_order: bool = False  # a run that is continued may take up its position in other data than it left
    exit_on_missing_checkpoint: bool = False

    eval_data: tuple[DataSettings, ...] = ()
    eval_interval: int = 0
    eval_iters: int = 0  # global batches per entry of eval_data, from its first row; 0: all of it
    keep_best: bool = False  # the checkpoint of the lowest evaluation loss in <save>/best
    early_stop_patience: int = 0  # evaluations in a row without improvement that end the run; 0: none
    early_stop_min_delta: float = 0.0  # what counts as an improvement

    log_interval: int = 1
    log_params_norm: bool = False
    log_memory: bool = False  # in TensorBoard; metrics.jsonl and the log line always tell it
    log_timers: bool = False
    tensorboard_dir: Path | None = None
    tensorboard_queue_size: int = 10
    read_losses: Literal["auto", "now", "late"] = "auto"  # late: while the next step runs; auto: so on a GPU
    profile: ProfileSettings | None = None
    peak_tflops: float | None = None  # of one rank's device, for MFU; None: known by the GPU's name
