"""What one rank's GPU must hold while this model trains, by formula. No torch here; tests compare with live tensors.

Shape letters: s sequence, b micro-batch, h hidden, f ffn, n heads, v vocab, t tensor-parallel ranks; e bytes per
element (2 in bf16, 4 in fp32). The activations are those of Korthikanti et al. 2022, "Reducing Activation Recomputation
in Large Transformer Models", section 4, redone for this model with all fusions on: attention keeps no s x s scores,
rotary turns q and k in place, SwiGLU keeps its input alone, and without dropout there are no masks. Kept per token of a
layer for its backward pass:

    e * (4h       each LayerNorm's input and output (/ t with sequence parallelism)
       + 4h / t   the projection that q, k and v are views of (3h), the attention's output
       + 3f / t)  both branches with their bias (2f), their product
    + 4n / t      the softmax's log-sum-exp, fp32
    + 16          both LayerNorms' mean and 1/std, fp32 (/ t with sequence parallelism)

In fp8 the linear layers keep their inputs in one byte a number (with sequence parallelism not the LayerNorms' outputs);
the attention's output is then kept once more by the attention. Offloaded, all of these of OFFLOADED_FROM bytes and more
are in the host's memory, and one layer's at a time on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.model.fusions import OFFLOADED_FROM

# Tokens whose logits the loss works on at a time on a GPU.
LOSS_CHUNK = 2048

Recompute = Literal["none", "selective", "full"]
OptimizerStates = Literal["fp32", "bf16", "8bit"]
# Bytes of both moments of a parameter. In 8bit, 256 numbers also share a byte (moments.py).
STATE_BYTES: dict[OptimizerStates, float] = {"fp32": 8, "bf16": 4, "8bit": 2 + 2 / 256}


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over ranks: sizes of tensor, pipeline and data parallelism, sequences per micro-batch.

    sequence_parallel splits the activations between the blocks over the tensor-parallel ranks, distributed_optimizer
    the optimizer's state over the data-parallel ones.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: Recompute = "none"


@dataclass(frozen=True)
class Savings:
    """What a run does to take less memory, besides recomputation, by the names of its flags.

    loss_chunk: 0 for the trainer's own choice on a GPU.
    """

    optimizer_states: OptimizerStates = "fp32"
    fp8: bool = False
    offload_activations: bool = False
    loss_chunk: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, by what they are for.

    optimizer: fp32 main weights (bf16 runs only) and Adam's two moments. activations: what is kept between the forward
    and the backward pass, of all layers and micro-batches in flight. loss: what the loss takes besides: logits that it
    keeps in the model's precision (none with full recomputation), a chunk of them in work, their gradient. layer: what
    one layer's backward pass takes besides, recomputed or fetched activations included. These two are not there at the
    same time. host: not on the GPU, but in its node's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    layer: int
    host: int = 0

    @property
    def total(self) -> int:
        """The most that is on the GPU at a time."""
        return self.weights + self.gradients + self.optimizer + self.activations + max(self.loss, self.layer)


def stage_parameters(model: ModelConfig, tp: int = 1, pp: int = 1, stage: int = 0) -> int:
    """Parameters that one tensor-parallel rank of a pipeline stage holds.

    What is not split (LayerNorms, biases of the projections back into the residual stream) counts on every rank, and a
    tied head's copy of the embedding on the last of several stages.
    """
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    split = (3 * h * h + 3 * h) + h * h + 2 * (h * f + f) + f * h
    layer = split // tp + 2 * h + 4 * h
    count = model.num_layers // pp * layer
    last = stage == pp - 1
    if stage == 0:
        count += v * h // tp
    if last:
        count += 2 * h
    if last and (pp > 1 or not model.tie_word_embeddings):
        count += v * h // tp
    return count


def rank_memory(
    model: ModelConfig,
    layout: Layout,
    *,
    seq_length: int,
    micro_batches: int,
    bf16: bool = True,
    stage: int = 0,
    savings: Savings = Savings(),
    compiled: bool = True,
) -> RankMemory:
    """The memory of a rank of pipeline stage `stage` (from 0) at the step's fullest moment.

    micro_batches: of one data-parallel rank per step. Gradients are fp32, as the trainer keeps them. In the
    one-forward-one-backward schedule, stage i holds the activations of min(stages - i, micro_batches) micro-batches.
    compiled: as on a GPU; otherwise a pass of several operations has tensors between them.
    """
    parameters = stage_parameters(model, layout.tp, layout.pp, stage)
    element = 2 if bf16 else 4
    tokens = seq_length * layout.micro_batch
    h, t = model.hidden_size, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    in_flight = min(layout.pp - stage, micro_batches)

    layer = layer_activations(model, layout, seq_length=seq_length, bf16=bf16, savings=savings)
    layers = model.num_layers // layout.pp
    held, host = layers * layer.kept, layers * layer.host
    if first:
        held += tokens * 8  # the token numbers, for the embedding's gradient
    if last:
        # The final norm's input and statistics, its output from all ranks, and of each token the label and log-sum-exp.
        split = t if layout.sequence_parallel else 1
        norm_kept, norm_host = _offloaded([h * element * tokens // split, *[4 * tokens // split] * 2], savings)
        held += norm_kept + (h * element + 12) * tokens
        host += norm_host

    optimizer = parameters * ((4 if bf16 else 0) + STATE_BYTES[savings.optimizer_states])
    return RankMemory(
        weights=parameters * element,
        gradients=parameters * 4,
        optimizer=ceil(optimizer / (layout.dp if layout.distributed_optimizer else 1)),
        activations=in_flight * held,
        loss=_loss(model, layout, tokens, element, savings, compiled) if last else 0,
        layer=layer.at_a_time + _layer_backward(model, layout, tokens, element, savings),
        host=in_flight * host,
    )


def _loss(model: ModelConfig, layout: Layout, tokens: int, element: int, savings: Savings, compiled: bool) -> int:
    """What the loss holds when its backward pass begins; not compiled, at the end of its forward pass."""
    chunk = min(tokens, savings.loss_chunk or LOSS_CHUNK)
    keeps = layout.recompute != "full"
    kept = (tokens if keeps else chunk) * element
    # Compiled, a chunk's gradient. Otherwise a chunk in fp32, scaled, beside (of bf16) the unscaled one.
    work = chunk * (element if compiled else 8 if element == 2 else 4)
    return model.vocab_size // layout.tp * (kept + work) + (model.hidden_size * tokens * element if compiled else 0)


def _layer_backward(model: ModelConfig, layout: Layout, tokens: int, element: int, savings: Savings) -> int:
    """What a layer's backward pass takes besides its activations, where it takes most: at SwiGLU, or, in fp8, at the
    linear layer before it, whose weight's gradient is there in fp32 before it is added."""
    h, f, t = model.hidden_size, model.ffn_hidden_size, layout.tp
    gathered = h * tokens * element if layout.sequence_parallel else 0
    flowing = 2 * h * tokens * element
    # The product's gradient and its input's; the second linear layer's input is freed by then.
    at_swiglu = 3 * f * tokens // t * element - f * tokens // t * (1 if savings.fp8 else element)
    # The gradient twice in a byte; SwiGLU's input is freed. The weight in fp8 twice, or its gradient.
    at_linear = (4 * f - f) * tokens // t + 8 * f * h // t if savings.fp8 else 0
    return max(at_swiglu, at_linear) + flowing + gathered


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer and micro-batch: kept on the GPU and in the host's memory until the backward pass, and on the
    GPU besides for the one layer whose backward pass it is."""

    kept: int
    host: int
    at_a_time: int


def layer_activations(
    model: ModelConfig, layout: Layout, *, seq_length: int, bf16: bool = True, savings: Savings = Savings()
) -> LayerActivations:
    """What a layer keeps.

    Selective recomputation runs the attention again; as that kept no scores, there is little to save but the
    log-sum-exp. Full recomputation keeps a layer's input only.
    """
    element = 2 if bf16 else 4
    tokens = seq_length * layout.micro_batch
    h, f, n, t = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, layout.tp
    split = t if layout.sequence_parallel else 1
    by_linear = 1 if savings.fp8 else element  # bytes of a number that a linear layer keeps
    normed = h * tokens // split * (element if layout.sequence_parallel else by_linear)
    statistics = [4 * tokens // split] * 2
    layer_input = [h * tokens // split * element]
    log_sum_exp = [4 * n * tokens // t]
    attended = [h * tokens // t * element]
    others = [
        *[normed, *statistics] * 2,
        h * tokens // split * element,  # the second norm's input
        3 * h * tokens // t * element,
        2 * f * tokens // t * element,
        f * tokens // t * by_linear,
        *[h * tokens // t] * savings.fp8,
    ]
    everything = layer_input + log_sum_exp + attended + others
    if layout.recompute == "full":
        kept, again = layer_input, sum(everything)
    elif layout.recompute == "selective":
        # The attention's own output is made again beside the one that the projection keeps.
        kept, again = layer_input + attended + others, sum(log_sum_exp + attended)
    else:
        kept, again = everything, 0
    on_gpu, in_host = _offloaded(kept, savings)
    return LayerActivations(on_gpu, in_host, again + in_host)


def _offloaded(sizes: list[int], savings: Savings) -> tuple[int, int]:
    """Bytes of these tensors that stay, and that go to the host's memory."""
    away = sum(size for size in sizes if savings.offload_activations and size >= OFFLOADED_FROM)
    return sum(sizes) - away, away
