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
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron.crystalcoder.model.config import ModelConfig

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
class RankMemory:
    """Bytes on one rank, by what they are for.

    optimizer: fp32 main weights (bf16 runs only) and Adam's two moments. logits: those that the loss keeps in the
    model's precision (none with full recomputation), one chunk of them and that chunk's gradient. workspace: what lives
    only inside one layer's backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


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
    model: ModelConfig, layout: Layout, *, seq_length: int, micro_batches: int, bf16: bool = True, stage: int = 0
) -> RankMemory:
    """The memory of a rank of pipeline stage `stage` (from 0) at the step's fullest moment.

    micro_batches: of one data-parallel rank per step. Gradients are fp32, as the trainer keeps them. In the
    one-forward-one-backward schedule, stage i holds the activations of min(stages - i, micro_batches) micro-batches.
    """
    parameters = stage_parameters(model, layout.tp, layout.pp, stage)
    element = 2 if bf16 else 4
    tokens = seq_length * layout.micro_batch
    h, f, v, t = model.hidden_size, model.ffn_hidden_size, model.vocab_size, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    in_flight = min(layout.pp - stage, micro_batches)

    kept, recomputed = layer_activations(model, layout, seq_length=seq_length, bf16=bf16)
    held = model.num_layers // layout.pp * kept
    if first:
        held += tokens * 8  # the token numbers, for the embedding's gradient
    if last:
        # The final norm's input and statistics, its output from all ranks, and of each token the label and log-sum-exp.
        held += (h * element + 8) * tokens // (t if layout.sequence_parallel else 1) + (h * element + 12) * tokens

    kept_logits = 0 if layout.recompute == "full" else tokens
    swiglu_gradients = 3 * f * tokens // t * element + 2 * h * tokens * element
    gathered = h * tokens * element if layout.sequence_parallel else 0
    return RankMemory(
        weights=parameters * element,
        gradients=parameters * 4,
        optimizer=-(-parameters * (12 if bf16 else 8) // (layout.dp if layout.distributed_optimizer else 1)),
        activations=in_flight * held + recomputed,
        logits=v // t * element * (kept_logits + 2 * min(tokens, LOSS_CHUNK)) if last else 0,
        workspace=swiglu_gradients + gathered,
    )


def layer_activations(model: ModelConfig, layout: Layout, *, seq_length: int, bf16: bool = True) -> tuple[int, int]:
    """Bytes that a layer keeps per micro-batch until its backward pass, and bytes recomputed for one layer at a time.

    Selective recomputation runs the attention again; as that kept no scores, there is little to save but the
    log-sum-exp. Full recomputation keeps a layer's input only.
    """
    element = 2 if bf16 else 4
    tokens = seq_length * layout.micro_batch
    h, f, n, t = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, layout.tp
    sequence_split = t if layout.sequence_parallel else 1
    log_sum_exp = 4 * n * tokens // t
    everything = (
        4 * h * tokens // sequence_split * element
        + (4 * h + 3 * f) * tokens // t * element
        + log_sum_exp
        + 16 * tokens // sequence_split
    )
    if layout.recompute == "selective":
        return everything - log_sum_exp, log_sum_exp + h * tokens // t * element
    if layout.recompute == "full":
        return h * tokens // sequence_split * element, everything
    return everything, 0
