"""CrystalCoder for Hugging Face transformers. Needs nothing of this project: it also runs as remote code.

A pre-norm decoder: x + Attention(LN(x)), x + MLP(LN(x)), partial interleaved rotary positions, SwiGLU, a bias on every
linear, a head tied to the embedding, and muP: embeddings times a constant, scores q.k / d, logits times a constant
(Yang et al. 2022, "Tensor Programs V"). Linear weights are stored [in, out], as GPT-2 does.

Shapes: b batch, s sequence, h hidden, n heads, d head dim, r rotary dims, f ffn, v vocab.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .configuration_crystalcoder import CrystalCoderConfig

# transformers has renamed and dropped arguments of this function between minor versions: we pass those that it has.
_CAUSAL_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)


def rotary_cos_sin(config: CrystalCoderConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position * theta^(-2i/r), each (b, 1, s, r/2) in fp32, for `position_ids` (b, s).

    Always fp32: in bf16, positions above 256 are not even representable.
    """
    r = config.rotary_ndims
    exponents = torch.arange(0, r, 2, device=position_ids.device, dtype=torch.float32) / r
    angles = position_ids[:, None, :, None].float() * config.rope_theta**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring pairs (2i, 2i+1) of the first r dims of `x` (b, n, s, d); the rest passes through."""
    pairs, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the one that can return its weights (b, n, s, s). The softmax is in fp32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ResidualConv1D(Conv1D):
    """A linear that writes to the residual stream: a class of its own because it starts smaller."""


class CrystalCoderAttention(nn.Module):
    """Causal multi-head attention; `c_attn`'s columns are all q, all k, all v, each head by head."""

    def __init__(self, config: CrystalCoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.scaling = config.softmax_scale
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = ResidualConv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (b, s, h) -> (b, s, h) and, from eager attention, the weights."""
        b, s, h = x.shape
        query, key, value = (t.view(b, s, -1, self.head_dim).transpose(1, 2) for t in self.c_attn(x).split(h, dim=-1))
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            **kwargs,
        )
        return self.resid_dropout(self.c_proj(output.reshape(b, s, h))), weights


class CrystalCoderMLP(nn.Module):
    """SwiGLU: `c_fc2` is the gate, `c_fc` the linear branch."""

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_inner, config.n_embd)
        self.c_fc2 = Conv1D(config.n_inner, config.n_embd)
        self.c_proj = ResidualConv1D(config.n_embd, config.n_inner)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (b, s, h) -> (b, s, h)."""
        return self.dropout(self.c_proj(self.c_fc(x) * nn.functional.silu(self.c_fc2(x))))


class CrystalCoderBlock(GradientCheckpointingLayer):
    """One layer. Returns the hidden state (b, s, h) and the attention weights, if attention gives any."""

    def __init__(self, config: CrystalCoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CrystalCoderAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = CrystalCoderMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attn(self.ln_1(x), attention_mask, rotary, past_key_values, **kwargs)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), weights


class CrystalCoderPreTrainedModel(PreTrainedModel):
    """What the model has in common with and without its head: capabilities, initialisation, tolerance in loading."""

    config: CrystalCoderConfig
    config_class = CrystalCoderConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrystalCoderBlock"]  # noqa: RUF012 - the names and kinds of attributes transformers reads
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Published checkpoints carry the causal mask of each layer as a buffer.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would guess it from words in this file, other ones in each version

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """muP initialisation: hidden matrices N(0, range^2 * width_scale), those that write to the residual stream
        additionally / sqrt(2 * layers); embedding N(0, range^2); biases 0; norms 1 and 0."""
        # Through `nn.init`, never `.data`: transformers guards these functions so that loaded weights stay as they are.
        hidden_std = self.config.initializer_range * math.sqrt(self.config.mup_width_scale)
        if isinstance(module, Conv1D):
            shrink = math.sqrt(2 * self.config.n_layer) if isinstance(module, ResidualConv1D) else 1.0
            nn.init.normal_(module.weight, std=hidden_std / shrink)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class CrystalCoderModel(CrystalCoderPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([CrystalCoderBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states (b, s, h) after the final norm, for `input_ids` (b, s) or unscaled `inputs_embeds` (b, s, h).

        attention_mask: (b, past + s), 0 at padding on either side; or a mask that transformers prepared.
        position_ids: (b, s); without them, positions count the unmasked tokens of each row. Given without an
            attention mask and a cache, positions that start again at 0 begin a new sequence (padding-free batches).
        past_key_values: the keys and values of what came before; grown in place.
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a layer that is run again in backward would write its keys twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, num_past)
        causal_mask = _causal_mask(config, inputs_embeds, attention_mask, past_key_values, num_past, position_ids)

        cos, sin = rotary_cos_sin(config, position_ids)
        rotary = cos.to(inputs_embeds.dtype), sin.to(inputs_embeds.dtype)
        x = self.drop(inputs_embeds * config.mup_embeddings_scale)
        hidden_states, attentions = [], []
        for block in self.h:
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = block(
                x, causal_mask, rotary, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
            if output_attentions:
                attentions.append(weights)
        x = self.ln_f(x)
        hidden_states.append(x)

        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class CrystalCoderLMHeadModel(CrystalCoderPreTrainedModel, GenerationMixin):
    """The decoder with its language modelling head, which is the embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: CrystalCoderConfig) -> None:
        super().__init__(config)
        self.transformer = CrystalCoderModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers would guess it from the class's name, which published maps fix
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (b, s, v), and the mean cross entropy (fp32) when `labels` are given; the rest as in the decoder.

        labels: (b, s), the input ids themselves (they are shifted here), -100 where no loss is wanted.
        logits_to_keep: only the last so many positions, or these positions; 0 keeps all.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        decoded = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(decoded.last_hidden_state[:, kept]) * self.config.output_scale

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )
        return output if return_dict else output.to_tuple()


def _positions(inputs_embeds: torch.Tensor, attention_mask: Any, num_past: int) -> torch.Tensor:
    """Positions (1 or b, s) of the new tokens: how many unmasked tokens stand before each."""
    s = inputs_embeds.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.to(inputs_embeds.device).long().cumsum(-1) - 1
        return counted[:, num_past : num_past + s].clamp(min=0)
    return (num_past + torch.arange(s, device=inputs_embeds.device)).unsqueeze(0)


def _causal_mask(
    config: CrystalCoderConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    num_past: int,
    position_ids: torch.Tensor,
) -> Any:
    """The causal mask in the form that the configured attention wants."""
    s = inputs_embeds.shape[1]
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "input_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache_position": num_past + torch.arange(s, device=inputs_embeds.device),
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    return create_causal_mask(**{name: value for name, value in arguments.items() if name in _CAUSAL_MASK_ARGUMENTS})


__all__ = ["CrystalCoderLMHeadModel", "CrystalCoderModel", "CrystalCoderPreTrainedModel"]
