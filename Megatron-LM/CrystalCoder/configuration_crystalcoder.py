"""CrystalCoder's configuration for transformers. Needs nothing of this project: it also runs as remote code."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# Which class of which file beside config.json each Auto class loads; published checkpoints carry the same map.
AUTO_MAP = {
    "AutoConfig": "configuration_crystalcoder.CrystalCoderConfig",
    "AutoModel": "modeling_crystalcoder.CrystalCoderModel",
    "AutoModelForCausalLM": "modeling_crystalcoder.CrystalCoderLMHeadModel",
}


class CrystalCoderConfig(PreTrainedConfig):
    """Sizes and muP constants of a CrystalCoder. The defaults are the 7B model.

    n_inner: width of the MLP; None means 4 * n_embd.
    rotary_dim: dimensions of each head that rotary turns; None means all of them.
    rope_theta: base of the rotary angles.
    mup_width_scale: base width / width; the logits are multiplied by `mup_output_alpha * mup_width_scale`.
    mup_embeddings_scale: factor on the token embeddings.
    mup_scale_qk_dot_by_d: attention scores are q.k / d instead of q.k / sqrt(d).
    scale_attn_weights: False leaves q.k unscaled.
    initializer_range: standard deviation of a new model's embedding; its other matrices follow from it and muP.

    Raises ValueError for a configuration that is not a CrystalCoder: another activation or position embedding, sizes
    that do not divide, or one of GPT-2's options that this architecture does not have.
    """

    model_type = "crystalcoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the name and kind of attribute transformers reads
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 32032,
        n_positions: int = 2048,
        n_embd: int = 4096,
        n_layer: int = 32,
        n_head: int = 32,
        n_inner: int | None = 10922,
        activation_function: str = "swiglu",
        resid_pdrop: float = 0.0,
        embd_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        scale_attn_weights: bool = True,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        position_embedding_type: str = "rotary",
        rotary_dim: int | None = 32,
        rope_theta: float = 10000.0,
        mup_width_scale: float = 0.0625,
        mup_embeddings_scale: float = 14.6,
        mup_output_alpha: float = 2.22,
        mup_scale_qk_dot_by_d: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = 4 * n_embd if n_inner is None else n_inner
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.scale_attn_weights = scale_attn_weights
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.position_embedding_type = position_embedding_type
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.mup_width_scale = mup_width_scale
        self.mup_embeddings_scale = mup_embeddings_scale
        self.mup_output_alpha = mup_output_alpha
        self.mup_scale_qk_dot_by_d = mup_scale_qk_dot_by_d
        self.tie_word_embeddings = tie_word_embeddings

        _refuse_other_architectures(self, kwargs)
        # A saved checkpoint names all classes, whichever of them saved it, and never somebody else's repository.
        super().__init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})

    @property
    def head_dim(self) -> int:
        """d."""
        return self.n_embd // self.n_head

    @property
    def rotary_ndims(self) -> int:
        """Dimensions of each head that rotary turns: `rotary_dim`, or the whole head."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q.k before the softmax."""
        if not self.scale_attn_weights:
            return 1.0
        return 1 / self.head_dim if self.mup_scale_qk_dot_by_d else self.head_dim**-0.5

    @property
    def output_scale(self) -> float:
        """Factor on the logits: 0.13875 for the 7B model."""
        return self.mup_output_alpha * self.mup_width_scale

    @property
    def logit_scale(self) -> float:
        """`output_scale` under the name by which vLLM, which puts a head of its own on the decoder, looks for it."""
        return self.output_scale


def _refuse_other_architectures(config: CrystalCoderConfig, others: dict[str, Any]) -> None:
    """Raise ValueError for what would otherwise be computed wrongly in silence."""
    if config.activation_function != "swiglu":
        raise ValueError(f"activation_function is {config.activation_function!r}: CrystalCoder has 'swiglu' only")
    if config.position_embedding_type != "rotary":
        raise ValueError(
            f"position_embedding_type is {config.position_embedding_type!r}: CrystalCoder has 'rotary' only"
        )
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if others.get(option):
            raise ValueError(f"{option} is set: CrystalCoder does not have it")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    if not 0 < config.rotary_ndims <= config.head_dim or config.rotary_ndims % 2:
        raise ValueError(
            f"rotary_dim {config.rotary_ndims} must be even, at least 2, at most the head size {config.head_dim}"
        )
