"""params.yaml -> TrainConfig: the front door of pretraining."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ValidationError

from data_prep.errors import InputError
from data_prep.subset import parse_subset
from megatron.crystalcoder.model.config import ModelConfig, MuP, ParallelConfig
from megatron.crystalcoder.model.initialization import InitSettings, Normal, Uniform
from megatron.crystalcoder.training.config import (
    DataSettings,
    MixtureEntry,
    OptimizerSettings,
    PiecewiseSchedule,
    ScheduleSegment,
    TrainConfig,
)
from megatron.crystalcoder.training.params_schema import Initializer, Input, ParamsSchema, Scheduler, Section
from megatron.crystalcoder.training.yaml_lines import KeyPath, YamlFile, read_yaml

Mode = Literal["train", "eval", "train_and_eval"]
# Without a micro-batch size from the user, a micro-batch holds at most this many tokens.
_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ReferenceCompat:
    """Which of the CS-2 run's own choices (release 1.9.1) take the place of the sound ones.

    order: its data order. adam: eps added before the bias correction. init: the gate's bias (and, without
    scale_glu_initialization, its weight) left at torch's uniform default.
    """

    order: bool = False
    adam: bool = False
    init: bool = False


THE_SOUND_WAY = ReferenceCompat()


@dataclass(frozen=True)
class Params:
    """A params.yaml that was read, checked and found consistent."""

    file: YamlFile
    values: ParamsSchema
    reference: ReferenceCompat = THE_SOUND_WAY

    def train_config(
        self,
        *,
        parallel: ParallelConfig | None = None,
        dp_size: int = 1,
        micro_batch_size: int | None = None,
        mode: Mode | None = None,
        model_dir: Path | None = None,
        checkpoint_path: Path | None = None,
        data_root: Path | None = None,
    ) -> TrainConfig:
        """The run that the file describes; arguments that are given win over its runconfig.

        dp_size: data-parallel ranks, among which the global batch is divided when no micro-batch size is given.
        data_root: what relative data directories are relative to; the current directory without it.
        """
        values, run, root = self.values, self.values.runconfig, data_root or Path()
        scaling = values.optimizer.adjust_learning_rate
        model, seq_length = self.model_config(), self.seq_length
        global_batch = values.train_input.batch_size
        evaluates = (mode or run.mode) != "train" and values.eval_input is not None
        checkpoint = checkpoint_path or (Path(run.checkpoint_path) if run.checkpoint_path else None)
        save = model_dir or Path(run.model_dir or "model_dir")
        return TrainConfig(
            model=model,
            parallel=parallel or ParallelConfig(),
            data=_training_data(values.train_input, root, self.reference.order),
            schedule=self.schedule(),
            optimizer=OptimizerSettings(
                adam_beta1=values.optimizer.beta1,
                adam_beta2=values.optimizer.beta2,
                adam_eps=values.optimizer.eps,
                weight_decay=values.optimizer.weight_decay_rate,
                clip_grad=values.optimizer.max_gradient_norm or 0.0,
                hidden_lr_scale=scaling.decoder_kernel if scaling else 1.0,
                scale_hidden_biases=False,
                eps_before_correction=self.reference.adam,
            ),
            train_iters=run.max_steps,
            micro_batch_size=micro_batch_size
            or values.train_input.micro_batch_size
            or default_micro_batch_size(global_batch, dp_size, seq_length),
            global_batch_size=global_batch,
            seq_length=seq_length,
            bf16=values.model.mixed_precision,
            loss_reduction="sequence" if values.model.loss_scaling == "batch_size" else "token",
            loss_weight=values.model.loss_weight if values.model.loss_scaling == "batch_size" else 1.0,
            seed=run.seed,
            load=checkpoint,
            finetune=True,
            exit_on_missing_checkpoint=True,
            save=save,
            save_interval=run.checkpoint_steps,
            eval_data=_evaluation_data(values.eval_input, root) if evaluates and values.eval_input else (),
            eval_interval=(run.eval_frequency or run.checkpoint_steps or run.max_steps) if evaluates else 0,
            eval_iters=self._eval_iters(),
            log_interval=run.log_steps,
            tensorboard_dir=save / "tensorboard",
        )

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        return self.values.train_input.max_sequence_length or self.values.model.max_position_embeddings

    def model_config(self) -> ModelConfig:
        """The model; muP's width scale is the factor on the hidden layers' learning rate."""
        model, scaling = self.values.model, self.values.optimizer.adjust_learning_rate
        width_scale = scaling.decoder_kernel if scaling else 1.0
        return ModelConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_layers=model.num_hidden_layers,
            num_attention_heads=model.num_heads,
            ffn_hidden_size=model.filter_size,
            rotary_dim=model.rotary_dim,
            max_sequence_length=model.max_position_embeddings,
            layernorm_epsilon=model.layer_norm_epsilon,
            tie_word_embeddings=model.share_embedding_weights,
            mup=MuP(
                width_scale=width_scale,
                output_alpha=model.output_logits_scale / width_scale,
                embeddings_scale=model.embeddings_scale,
                scale_qk_dot_by_d=model.scale_qk_dot_by_d,
            ),
        )

    def init_settings(self) -> InitSettings:
        """How new weights are drawn; without output_layer_initializer those layers use `initializer`."""
        model = self.values.model
        torch_default = Uniform(model.hidden_size**-0.5) if self.reference.init else None
        return InitSettings(
            embedding=_normal(model.embedding_initializer),
            hidden=_normal(model.initializer),
            output=_normal(model.output_layer_initializer or model.initializer),
            gate_bias=torch_default,
            gate=None if model.scale_glu_initialization else torch_default,
        )

    @property
    def init_seed(self) -> int:
        """Seed of new weights: weight_initialization_seed, or else the run's seed."""
        seed = self.values.model.weight_initialization_seed
        return self.values.runconfig.seed if seed is None else seed

    def schedule(self) -> PiecewiseSchedule:
        """The list of schedulers, one after the other."""
        return PiecewiseSchedule(
            tuple(part for each in self.values.optimizer.learning_rate for part in _segments(each))
        )

    def without_effect(self) -> list[str]:
        """The keys of the file that mean something on a CS-2 system only, in the order of the schema."""
        values = self.values
        sections: dict[str, Section | None] = {
            "train_input.": values.train_input,
            "eval_input.": values.eval_input,
            "model.": values.model,
            "optimizer.": values.optimizer,
            "runconfig.": values.runconfig,
            "cerebras.": values.cerebras,
        }
        return [key for prefix, section in sections.items() if section for key in section.without_effect(prefix)]

    def _eval_iters(self) -> int:
        """eval_steps batches of the evaluation's batch size, as global batches of training, rounded up; 0: all rows."""
        evaluation, steps = self.values.eval_input, self.values.runconfig.eval_steps
        if evaluation is None or steps is None:
            return 0
        return -(-steps * evaluation.batch_size // self.values.train_input.batch_size)


def load_params(
    path: Path,
    overrides: Iterable[str] = (),
    reference: ReferenceCompat = THE_SOUND_WAY,
) -> Params:
    """Read a params.yaml and apply `key.path=value` overrides.

    Raises InputError with file, line, key and remedy: an unknown key (and the nearest valid one), a wrong type, a
    missing key, values that do not go together.
    """
    file = read_yaml(path)
    for assignment in overrides:
        file.override(assignment)
    try:
        values = ParamsSchema.model_validate(file.values)
    except ValidationError as error:
        _refuse(file, error.errors())
    _check_consistency(file, values)
    if not reference.order:
        _refuse_idle_weights(file, values)
    if not (values.model.scale_glu_initialization or reference.init):
        raise InputError(
            f"{file.place(('model', 'scale_glu_initialization'))}: model.scale_glu_initialization False leaves the "
            "gate's weight at torch's default: set it True, or pass --reference-init to have that"
        )
    return Params(file, values, reference)


def _refuse_idle_weights(file: YamlFile, values: ParamsSchema) -> None:
    """A dataset that is never drawn is a mistake, except where the reference's own use of it is wanted."""
    for section in ("train_input", "eval_input"):
        source: Input | None = getattr(values, section)
        for number, item in enumerate((source and source.mixture) or ()):
            keys: KeyPath = (section, "mixture", number, "weight")
            if item.weight == 0:
                raise InputError(
                    f"{file.place(keys)}: {_name(keys)} is 0, so {item.data_dir} is never drawn: give it a weight "
                    "above 0, or remove the item"
                )


def default_micro_batch_size(global_batch: int, dp_size: int, seq_length: int) -> int:
    """The largest size that divides each rank's share of the global batch and holds no more than 4,096 tokens."""
    share = max(1, global_batch // dp_size)
    largest = max(1, _MICRO_BATCH_TOKENS // seq_length)
    return max(size for size in range(1, min(largest, share) + 1) if share % size == 0)


def _training_data(source: Input, root: Path, reference_order: bool = False) -> DataSettings:
    # Release 1.9.1 shuffles unless told not to.
    shuffle = source.shuffle or (reference_order and "shuffle" not in source.model_fields_set)
    order: Literal["shuffled", "single", "mixture"] = "shuffled" if shuffle else "single"
    mixture: tuple[MixtureEntry, ...] = ()
    paths: tuple[Path, ...] = ()
    if source.mixture is not None:
        order = "shuffled" if shuffle else "mixture"
        mixture = tuple(_entry(item.data_dir, item.weight, item.data_subset, root) for item in source.mixture)
    elif source.data_subset is not None:
        order = "shuffled" if shuffle else "mixture"
        mixture = tuple(_entry(each, 1.0, source.data_subset, root) for each in source.data_dir or ())
    else:
        paths = tuple(root / each for each in source.data_dir or ())
    return DataSettings(
        paths=paths,
        mixture=mixture,
        order=order,
        seed=source.shuffle_seed,
        num_workers=source.num_workers,
        reference_order=reference_order,
    )


def _evaluation_data(source: Input, root: Path) -> tuple[DataSettings, ...]:
    """One entry per directory, so that each gets a loss of its own; a mixture is one entry."""
    whole = _training_data(source, root)
    if whole.mixture:
        return (whole,)
    return tuple(DataSettings(paths=(path,), order=whole.order, seed=whole.seed) for path in whole.paths)


def _entry(data_dir: str, weight: float, subset: str | None, root: Path) -> MixtureEntry:
    return MixtureEntry(root / data_dir, weight, ((0.0, 1.0),) if subset is None else parse_subset(subset))


def _normal(initializer: Initializer) -> Normal:
    return Normal(initializer.std, initializer.a, initializer.b)


def _segments(scheduler: Scheduler) -> list[ScheduleSegment]:
    if scheduler.values is not None:
        bounds, length = scheduler.boundaries or [], scheduler.steps or scheduler.decay_steps
        ends = [*bounds, length or (bounds[-1] if bounds else 0)]
        return [
            ScheduleSegment("Constant", value, value, end - start)
            for value, start, end in zip(scheduler.values, [0, *bounds], ends, strict=True)
        ]
    rates = (scheduler.learning_rate, scheduler.initial_learning_rate, scheduler.base_lr)
    initial = next(rate for rate in rates if rate is not None)
    end = initial if scheduler.end_learning_rate is None else scheduler.end_learning_rate
    assert scheduler.scheduler != "PiecewiseConstant"  # those have values
    return [
        ScheduleSegment(
            scheduler.scheduler,
            initial,
            end,
            scheduler.steps or scheduler.decay_steps or 0,
            decay_rate=scheduler.decay_rate or 1.0,
            staircase=scheduler.staircase,
            power=scheduler.power or 1.0,
        )
    ]


def _check_consistency(file: YamlFile, values: ParamsSchema) -> None:
    """What no single key can be blamed for by the schema; each refusal points at the key to change."""

    def refuse(keys: KeyPath, message: str) -> NoReturn:
        raise InputError(f"{file.place(keys)}: {_name(keys)} {message}")

    model = values.model
    if model.mixed_precision and not model.use_bfloat16:
        refuse(
            ("model", "mixed_precision"), "without use_bfloat16 is fp16, which is not supported: set use_bfloat16 True"
        )
    if model.hidden_size % model.num_heads:
        refuse(("model", "num_heads"), f"{model.num_heads} does not divide hidden_size {model.hidden_size}: change one")
    head_dim = model.hidden_size // model.num_heads
    if model.rotary_dim % 2 or model.rotary_dim > head_dim:
        refuse(("model", "rotary_dim"), f"{model.rotary_dim} must be even and at most the head size, {head_dim}")
    for key in ("initializer", "embedding_initializer", "output_layer_initializer"):
        each: Initializer | None = getattr(model, key)
        if (
            each is not None
            and each.name == "truncated_normal"
            and (each.a is None or each.b is None or each.a >= each.b)
        ):
            refuse(("model", key), "truncated_normal needs its bounds, a below b: give both")
        if each is not None and each.name == "normal" and (each.a is not None or each.b is not None):
            refuse(("model", key), "normal has no bounds: drop a and b, or name it truncated_normal")
    for number, scheduler in enumerate(values.optimizer.learning_rate):
        fault = _scheduler_fault(scheduler, last=number == len(values.optimizer.learning_rate) - 1)
        if fault:
            refuse(("optimizer", "learning_rate", number), fault)
    for section in ("train_input", "eval_input"):
        source: Input | None = getattr(values, section)
        if source is None:
            continue
        if (source.data_dir is None) == (source.mixture is None):
            refuse((section,), "needs either data_dir or mixture: give one of the two")
        if source.data_subset is not None and (source.data_dir is None or len(source.data_dir) != 1):
            refuse((section, "data_subset"), "belongs to one data_dir: give it to the items of a mixture")
        subsets: list[tuple[KeyPath, str | None]] = [((section, "data_subset"), source.data_subset)]
        subsets += [((section, "mixture", n, "data_subset"), i.data_subset) for n, i in enumerate(source.mixture or ())]
        for where, subset in subsets:
            try:
                parse_subset(subset or "0-1")
            except InputError as error:
                raise InputError(f"{file.place(where)}: {error}") from None
        if source.vocab_size not in (None, model.vocab_size):
            refuse(
                (section, "vocab_size"),
                f"{source.vocab_size} differs from model.vocab_size {model.vocab_size}: make them equal",
            )
        if source.mixture is not None and not any(item.weight for item in source.mixture):
            refuse((section, "mixture"), "has no weight above 0: give one")
    if (values.train_input.max_sequence_length or 0) > model.max_position_embeddings:
        refuse(
            ("train_input", "max_sequence_length"),
            f"exceeds max_position_embeddings {model.max_position_embeddings}: lower it",
        )
    if values.runconfig.mode != "train" and values.eval_input is None:
        refuse(("runconfig", "mode"), f"{values.runconfig.mode} needs an eval_input section: add one")


def _scheduler_fault(scheduler: Scheduler, *, last: bool) -> str | None:
    """What is wrong with one scheduler, and the remedy; None if nothing."""
    kind, length = scheduler.scheduler, scheduler.steps or scheduler.decay_steps
    owners = {"values": "PiecewiseConstant", "boundaries": "PiecewiseConstant", "power": "Polynomial"}
    owners |= {"decay_rate": "Exponential", "staircase": "Exponential"}
    for key, owner in owners.items():
        if key in scheduler.model_fields_set and kind != owner:
            return f"{key} belongs to {owner}, not to {kind}: drop it"
    if kind == "PiecewiseConstant":
        bounds = scheduler.boundaries or []
        if scheduler.values is None or len(scheduler.values) != len(bounds) + 1:
            return "needs values, one more than boundaries: add them"
        ends = [0, *bounds, *([length] if length else [])]
        if any(end <= start for start, end in pairwise(ends)):
            return "boundaries must rise from above 0 to below steps: correct them"
    elif scheduler.learning_rate is scheduler.initial_learning_rate is scheduler.base_lr is None:
        return "has no initial rate: add initial_learning_rate"
    if kind in ("Linear", "CosineDecay", "Polynomial") and scheduler.end_learning_rate is None:
        return f"{kind} has no end: add end_learning_rate"
    if kind == "Exponential" and scheduler.decay_rate is None:
        return "Exponential has no decay_rate: add it"
    if not (length or (last and kind in ("Constant", "PiecewiseConstant"))):
        return "has no length: add steps"
    return None


def _refuse(file: YamlFile, errors: Sequence[Any]) -> NoReturn:
    """Say the first of pydantic's findings in one line; unknown keys first, for a typo also makes a key missing."""
    error = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    keys: KeyPath = tuple(error["loc"])
    place, name = file.place(keys), _name(keys)
    if error["type"] == "extra_forbidden":
        raise InputError(f"{place}: unknown key {name}: {_suggestion(keys)}")
    if error["type"] == "missing":
        raise InputError(f"{place}: {name} is missing: add it")
    text = error["msg"].removeprefix("Input ").replace("'", "")
    raise InputError(f"{place}: {name} {text}, but is {error['input']!r}: correct it")


def _name(keys: KeyPath) -> str:
    return ".".join(map(str, keys))


def _suggestion(keys: KeyPath) -> str:
    """The nearest valid key of the section, or the section that has this very key."""
    section = _section_at(keys[:-1])
    unknown = str(keys[-1])
    close = get_close_matches(unknown, section.model_fields, n=1, cutoff=0.6)
    if close:
        return f"did you mean {_name((*keys[:-1], close[0]))}?"
    homes = [name for name in ParamsSchema.model_fields if unknown in _section_at((name,)).model_fields]
    if homes:
        return f"it belongs in {homes[0]}"
    return f"valid keys here are {', '.join(sorted(section.model_fields))}"


def _section_at(keys: KeyPath) -> type[BaseModel]:
    """The schema class of the section at a key path."""
    section: type[BaseModel] = ParamsSchema
    for key in keys:
        if isinstance(key, str):
            section = next(_sections_in(section.model_fields[key].annotation))
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes inside an annotation like `list[MixtureItem] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
