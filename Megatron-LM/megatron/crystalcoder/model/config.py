"""What a CrystalCoder is: sizes, muP constants, and how it is laid out over ranks. No torch here.

Shape letters used in the whole room: s sequence, b micro-batch, h hidden, n heads, d head dim, v vocab, f ffn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from data_prep.errors import InputError


@dataclass(frozen=True)
class MuP:
    """Maximal-update parametrisation constants (Yang et al. 2022, "Tensor Programs V"), as CrystalCoder uses them.

    width_scale: base width / width; multiplies the learning rate of hidden weights (and biases) and the logits.
    output_alpha: tuned logit multiplier at base width; logits are scaled by `output_alpha * width_scale`.
    embeddings_scale: multiplies the token embedding's output.
    scale_qk_dot_by_d: attention scores are q.k / d instead of q.k / sqrt(d).
    """

    width_scale: float = 1.0
    output_alpha: float = 1.0
    embeddings_scale: float = 1.0
    scale_qk_dot_by_d: bool = False

    @property
    def output_scale(self) -> float:
        """Factor on the logits: 0.13875 for the 7B model."""
        return self.output_alpha * self.width_scale


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one CrystalCoder. Defaults that are not sizes are the 7B model's.

    unpadded_vocab_size, unpadded_ffn_hidden_size: the model's own sizes where `vocab_size` and `ffn_hidden_size` are
    larger, padded with zeros so that tensor parallelism divides them; None where they are not.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    rotary_dim: int
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rotary_interleaved: bool = True
    tie_word_embeddings: bool = True
    mup: MuP = field(default_factory=MuP)
    unpadded_vocab_size: int | None = None
    unpadded_ffn_hidden_size: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden size {self.hidden_size} is not divisible by {self.num_attention_heads} attention heads: "
                "change one of the two"
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise InputError(
                f"rotary dim {self.rotary_dim} must be even and between 2 and the head dim {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """d."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_percent(self) -> float:
        """Share of each head that rotary turns: 0.25 for the 7B model."""
        return self.rotary_dim / self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q.k before the softmax."""
        return 1 / self.head_dim if self.mup.scale_qk_dot_by_d else self.head_dim**-0.5

    @property
    def unpadded(self) -> ModelConfig:
        """The same model without padding: what Hugging Face checkpoints hold."""
        return self.padded(
            self.unpadded_vocab_size or self.vocab_size, self.unpadded_ffn_hidden_size or self.ffn_hidden_size
        )

    def padded(self, vocab_size: int, ffn_hidden_size: int) -> ModelConfig:
        """The same model with these stored sizes, not smaller than its own."""
        own_vocab = self.unpadded_vocab_size or self.vocab_size
        own_ffn = self.unpadded_ffn_hidden_size or self.ffn_hidden_size
        return replace(
            self,
            vocab_size=vocab_size,
            ffn_hidden_size=ffn_hidden_size,
            unpadded_vocab_size=own_vocab if own_vocab != vocab_size else None,
            unpadded_ffn_hidden_size=own_ffn if own_ffn != ffn_hidden_size else None,
        )

    def with_ffn_multiple_of(self, multiple: int) -> ModelConfig:
        """The same model, its own FFN padded to the next multiple."""
        own = self.unpadded_ffn_hidden_size or self.ffn_hidden_size
        return self.padded(self.vocab_size, -(-own // multiple) * multiple)

    @property
    def num_parameters(self) -> int:
        """Stored parameters, the tied head counted once: 6,575,278,720 for the 7B model."""
        h, f, v = self.hidden_size, self.ffn_hidden_size, self.vocab_size
        layer = (3 * h * h + 3 * h) + (h * h + h) + 2 * (h * f + f) + (f * h + h) + 4 * h
        return v * h * (1 if self.tie_word_embeddings else 2) + self.num_layers * layer + 2 * h

    def check_layout(self, tensor_parallel: int, pipeline_parallel: int) -> None:
        """Raise InputError unless the model splits over this many tensor and pipeline ranks."""
        for name, size in (
            ("attention heads", self.num_attention_heads),
            ("vocabulary", self.vocab_size),
            ("ffn hidden size", self.ffn_hidden_size),
        ):
            if size % tensor_parallel:
                usable = [t for t in range(1, size + 1) if not any(x % t for x in self._split_sizes)]
                raise InputError(
                    f"tensor parallel size {tensor_parallel} does not divide the {name} ({size}): "
                    f"use one of {', '.join(map(str, usable))}"
                )
        if self.num_layers % pipeline_parallel:
            raise InputError(
                f"pipeline parallel size {pipeline_parallel} does not divide the {self.num_layers} layers: "
                "use a divisor of the number of layers"
            )

    @property
    def _split_sizes(self) -> tuple[int, int, int]:
        return self.num_attention_heads, self.vocab_size, self.ffn_hidden_size


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is laid out over ranks, and what is recomputed to save memory."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute: Literal["none", "selective", "full"] = "none"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
