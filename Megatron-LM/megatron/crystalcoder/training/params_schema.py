"""The keys of a params.yaml: the modelzoo GPT-3 schema (releases 1.9 and 2.0), as far as CrystalCoder's runs use it.

Every key is either obeyed; or has only one value that means anything here (a Literal: dropout must be 0); or steers
nothing but a CS-2 system (`NoEffect`), accepted so that one file serves both. Any other key is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

T = TypeVar("T")


class _NoEffect:
    """Marks a key that is accepted and changes nothing."""


NoEffect = Annotated[T, _NoEffect()]
Zero = Annotated[Literal[0], BeforeValidator(lambda value: 0 if value == 0 else value)]
One = Annotated[Literal[1], BeforeValidator(lambda value: 1 if value == 1 else value)]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Section(BaseModel):
    """Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def without_effect(self, prefix: str) -> list[str]:
        """The given keys, not null, that change nothing here."""
        return [
            f"{prefix}{name}"
            for name, info in type(self).model_fields.items()
            if any(isinstance(mark, _NoEffect) for mark in info.metadata)
            and name in self.model_fields_set
            and getattr(self, name) is not None
        ]


class Initializer(Section):
    """A distribution of initial weights; std is that before the cut to [a, b]."""

    name: Literal["truncated_normal", "normal"]
    mean: Zero = 0
    std: PositiveFloat
    a: float | None = None
    b: float | None = None


class Model(Section):
    """The model and its loss."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_heads: PositiveInt
    filter_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rotary_dim: PositiveInt
    share_embedding_weights: bool = True
    layer_norm_epsilon: PositiveFloat = 1e-5

    use_position_embedding: Literal[True] = True
    position_embedding_type: Literal["rotary"]
    nonlinearity: Literal["swiglu"]
    attention_type: Literal["scaled_dot_product"] = "scaled_dot_product"
    use_projection_bias_in_attention: Literal[True]
    use_ffn_bias_in_attention: Literal[True]
    use_ffn_bias: Literal[True]
    use_bias_in_output: Literal[False] = False
    dropout_rate: Zero = 0
    attention_dropout_rate: Zero = 0

    embeddings_scale: PositiveFloat = 1.0
    output_logits_scale: PositiveFloat = 1.0
    scale_qk_dot_by_d: bool = False

    initializer: Initializer
    embedding_initializer: Initializer
    output_layer_initializer: Initializer | None = None
    scale_glu_initialization: bool = True
    weight_initialization_seed: int | None = None

    loss_scaling: Literal["batch_size", "num_tokens"] = "num_tokens"
    loss_weight: PositiveFloat = 1.0
    mixed_precision: bool = False
    use_bfloat16: bool = False

    attention_softmax_fp32: NoEffect[Literal[True] | None] = None  # the softmax is always in fp32
    attention_kernel: NoEffect[str | None] = None
    boundary_casting: NoEffect[bool | None] = None


class Scheduler(Section):
    """One piece of the learning-rate schedule. learning_rate and base_lr are other names of initial_learning_rate, and
    decay_steps of steps; where several are given, learning_rate and steps win, as in the reference.

    PiecewiseConstant has values and boundaries instead of rates: values[0] up to the first boundary, and so on.
    """

    scheduler: Literal["Linear", "CosineDecay", "Constant", "Exponential", "Polynomial", "PiecewiseConstant"]
    initial_learning_rate: NonNegativeFloat | None = None
    learning_rate: NonNegativeFloat | None = None
    base_lr: NonNegativeFloat | None = None
    end_learning_rate: NonNegativeFloat | None = None
    steps: PositiveInt | None = None
    decay_steps: PositiveInt | None = None
    decay_rate: PositiveFloat | None = None
    staircase: bool = False
    power: PositiveFloat | None = None
    values: Annotated[list[NonNegativeFloat], Field(min_length=1)] | None = None
    boundaries: list[PositiveInt] | None = None


class AdjustLearningRate(Section):
    """Factors on the learning rate of groups of parameters."""

    decoder_kernel: PositiveFloat


def _one_rate_is_constant(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [{"scheduler": "Constant", "learning_rate": value}] if is_number else value


class Optimizer(Section):
    """AdamW and its schedule."""

    optimizer_type: Literal["AdamW"]
    learning_rate: Annotated[list[Scheduler], BeforeValidator(_one_rate_is_constant), Field(min_length=1)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-6
    weight_decay_rate: NonNegativeFloat = 0.0
    max_gradient_norm: PositiveFloat | None = None
    correct_bias: Literal[True] = True
    adjust_learning_rate: AdjustLearningRate | None = None

    loss_scaling_factor: One = 1  # bf16 and fp32 need no loss scaling
    log_summaries: NoEffect[bool | None] = None


class MixtureItem(Section):
    """One dataset of a mixture; `data_subset` "0.0-0.1,0.5-1.0" keeps those fractions of its rows."""

    data_dir: str
    weight: NonNegativeFloat
    data_subset: str | None = None


class Input(Section):
    """Where sequences come from: `data_dir` or `mixture`."""

    data_processor: Literal["GptHDF5MapDataProcessor"] = "GptHDF5MapDataProcessor"
    data_dir: Texts | None = None
    mixture: Annotated[list[MixtureItem], Field(min_length=1)] | None = None
    data_subset: str | None = None
    batch_size: PositiveInt  # global, in sequences
    micro_batch_size: PositiveInt | None = None
    max_sequence_length: PositiveInt | None = None
    vocab_size: PositiveInt | None = None
    shuffle: bool = False
    shuffle_seed: int = 0
    num_workers: Annotated[int, Field(ge=0)] = 0

    repeat: NoEffect[bool | None] = None  # training always repeats, evaluation never
    drop_last: NoEffect[bool | None] = None  # nothing is dropped
    prefetch_factor: NoEffect[int | None] = None
    persistent_workers: NoEffect[bool | None] = None
    use_worker_cache: NoEffect[bool | None] = None


class RunConfig(Section):
    """The run: how long, how often, from where to where."""

    max_steps: PositiveInt
    mode: Literal["train", "eval", "train_and_eval"] = "train"
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    eval_steps: PositiveInt | None = None
    eval_frequency: PositiveInt | None = None
    log_steps: PositiveInt = 1
    seed: int = 1
    model_dir: str | None = None
    checkpoint_path: str | None = None  # always gives weights alone
    is_pretrained_checkpoint: bool | None = None  # True: there must be a checkpoint_path

    num_epochs: None = None  # a run's length is max_steps
    num_steps: None = None
    save_initial_checkpoint: Literal[False] | None = None
    validate_only: Literal[False] | None = None
    compile_only: Literal[False] | None = None

    save_losses: NoEffect[bool | None] = None  # losses are always saved
    precision_opt_level: NoEffect[int | None] = None
    use_cs_grad_accum: NoEffect[bool | None] = None
    num_csx: NoEffect[int | None] = None
    num_workers_per_csx: NoEffect[int | None] = None
    num_act_servers: NoEffect[int | None] = None
    num_wgt_servers: NoEffect[int | None] = None
    mgmt_address: NoEffect[str | None] = None
    mgmt_namespace: NoEffect[str | None] = None
    credentials_path: NoEffect[str | None] = None
    debug_args_path: NoEffect[str | None] = None
    dist_addr: NoEffect[str | None] = None
    dist_backend: NoEffect[str | None] = None
    init_method: NoEffect[str | None] = None
    enable_distributed: NoEffect[bool | None] = None
    experimental_api: NoEffect[bool | None] = None
    job_labels: NoEffect[list[str] | None] = None
    job_time_sec: NoEffect[int | None] = None
    logging: NoEffect[str | None] = None
    mount_dirs: NoEffect[list[str] | None] = None
    python_paths: NoEffect[list[str] | None] = None
    service_dir: NoEffect[str | None] = None
    target_device: NoEffect[str | None] = None
    use_appliance_data: NoEffect[bool | None] = None
    compile_dir: NoEffect[str | None] = None
    disable_version_check: NoEffect[bool | None] = None
    wrk_memory_gi: NoEffect[int | None] = None


class Cerebras(Section):
    """Settings of the vendor's own data loader."""

    save_iter_state_path: NoEffect[str | None] = None


class ParamsSchema(Section):
    """A whole params.yaml."""

    train_input: Input
    eval_input: Input | None = None
    model: Model
    optimizer: Optimizer
    runconfig: RunConfig
    cerebras: Cerebras = Cerebras()
