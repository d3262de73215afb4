"""What a run costs, before it takes a GPU: FLOPs, and the layouts that fit, ranked by predicted step time. No torch.

The time of a step is a simple model, all of whose numbers can be read and changed:

    compute   FLOPs of the stage that has most (the last: its layers and the head), recomputation included,
              / (peak * mfu)
    + TP      4 all-reduces of s*b*h elements per layer and micro-batch (6 with full recomputation), over NVLink
    + host    offloaded activations, there and back, over PCIe
    + PP      s*b*h elements per micro-batch sent on and their gradient sent back
    * bubble  all that times 1 + (p - 1) / m, for p pipeline stages and m micro-batches (one forward, one backward)
    + DP      reduce-scatter of the fp32 gradients and all-gather of the weights

PP goes over NVLink where a copy of the model is inside one node, DP where all GPUs are, else over the network. Nothing
overlaps, and a micro-batch's size does not change mfu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig
from megatron.crystalcoder.training.memory import (
    Layout,
    RankMemory,
    Recompute,
    Savings,
    layer_activations,
    rank_memory,
    stage_parameters,
)

# Left to the CUDA context, NCCL's buffers and the allocator's gaps.
RESERVED_SHARE = 0.08
GPUS_PER_NODE = 8
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
# Of layouts equally fast, the one whose micro-batch is largest without passing this; the trainer's own default, too.
_COMFORTABLE_TOKENS = 4096


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that a process can have. flops: dense bf16 peak per second.

    nvlink, host: bytes per second, one way, to another GPU and to the host's memory.
    """

    memory: int
    flops: float
    nvlink: float
    host: float


GPUS = {
    "h100": Gpu(79 << 30, 989e12, 450e9, 50e9),
    "h200": Gpu(139 << 30, 989e12, 450e9, 50e9),
    "a100": Gpu(79 << 30, 312e12, 300e9, 25e9),
}


@dataclass(frozen=True)
class Cluster:
    """`count` GPUs. mfu: share of its peak that a GPU reaches while it computes. network: bytes per second per GPU."""

    gpu: Gpu
    count: int
    mfu: float = 0.4
    network: float = 50e9

    def speed_among(self, gpus: int) -> float:
        """Bytes per second from one to another of this many neighbouring GPUs."""
        return self.gpu.nvlink if gpus <= GPUS_PER_NODE else self.network


@dataclass(frozen=True)
class Job:
    """One step: the model, its global batch in sequences of seq_length tokens, the precision, and what saves memory.

    ffn_multiple: what each tensor-parallel rank's FFN is padded to a multiple of; 0: not at all.
    """

    model: ModelConfig
    global_batch: int
    seq_length: int
    bf16: bool = True
    savings: Savings = field(default_factory=Savings)
    ffn_multiple: int = 0

    def stored_model(self, tp: int) -> ModelConfig:
        """The model with the padding that it has on `tp` tensor-parallel ranks."""
        return self.model.with_ffn_multiple_of(self.ffn_multiple * tp) if self.ffn_multiple else self.model

    @property
    def step_flops(self) -> float:
        """Model FLOPs of a step; recomputation is not model FLOPs."""
        return flops_per_token(self.model, self.seq_length) * self.global_batch * self.seq_length


@dataclass(frozen=True)
class Candidate:
    """A layout, its fullest rank's memory and its predicted time; mfu counts model FLOPs over all of that time."""

    layout: Layout
    memory: RankMemory
    step_seconds: float
    mfu: float


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Model FLOPs of one token's forward and backward pass: 6 per parameter + 12 L h s for attention (PaLM, app. B).
    Padding does not count."""
    return 6 * model.unpadded.num_parameters + 12 * model.num_layers * model.hidden_size * seq_length


def stage_flops_per_token(model: ModelConfig, seq_length: int, pp: int, recompute: Recompute) -> float:
    """What the last of `pp` stages computes per token: its layers, forward, backward and again as recomputed, and the
    head. At pp 1 and without recomputation that is `flops_per_token`, but for the final norm (and an untied embedding).
    """
    head = 6 * model.vocab_size * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    attention = 4 * model.num_layers * model.hidden_size * seq_length  # of one forward pass
    forward = 2 * (model.num_parameters - embeddings) + attention
    again = {"none": 0, "selective": attention, "full": forward}[recompute]
    return (3 * forward + again) / pp + head


def step_seconds(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Predicted time of one step, by the model above."""
    model, tp, pp, dp = job.model, layout.tp, layout.pp, layout.dp
    tokens = job.global_batch * job.seq_length / dp
    element = 2 if job.bf16 else 4
    hidden_bytes = tokens * model.hidden_size * element

    flops = stage_flops_per_token(model, job.seq_length, pp, layout.recompute) * tokens / tp
    compute = flops / (cluster.gpu.flops * cluster.mfu)
    all_reduces = (6 if layout.recompute == "full" else 4) * model.num_layers / pp
    tensor_parallel = all_reduces * 2 * (tp - 1) / tp * hidden_bytes / cluster.gpu.nvlink
    pipeline = 0.0
    if pp > 1:
        pipeline = 2 * hidden_bytes / (tp if layout.sequence_parallel else 1) / cluster.speed_among(tp * pp)
    layer = layer_activations(model, layout, seq_length=job.seq_length, bf16=job.bf16, savings=job.savings)
    there_and_back = 2 * layer.host * model.num_layers / pp * _micro_batches(job, layout) / cluster.gpu.host
    data_parallel = (dp - 1) / dp * (4 + element) * stage_parameters(model, tp, pp) / cluster.speed_among(cluster.count)
    bubble = 1 + (pp - 1) / _micro_batches(job, layout)
    return (compute + tensor_parallel + there_and_back + pipeline) * bubble + data_parallel


def candidate(job: Job, layout: Layout, cluster: Cluster) -> Candidate:
    """Memory and time of one layout; the memory is that of the pipeline stage that needs most."""
    memory = max(
        (
            rank_memory(
                job.stored_model(layout.tp),
                layout,
                seq_length=job.seq_length,
                micro_batches=_micro_batches(job, layout),
                bf16=job.bf16,
                stage=stage,
                savings=job.savings,
            )
            for stage in range(layout.pp)
        ),
        key=lambda each: each.total,
    )
    seconds = step_seconds(job, layout, cluster)
    return Candidate(layout, memory, seconds, job.step_flops / (seconds * cluster.count * cluster.gpu.flops))


def fits(memory: RankMemory, gpu: Gpu) -> bool:
    """Whether a rank's memory fits its GPU."""
    return memory.total <= gpu.memory * (1 - RESERVED_SHARE)


def rank_layouts(
    job: Job, cluster: Cluster, *, tp: int | None = None, pp: int | None = None, micro_batch: int | None = None
) -> list[Candidate]:
    """The layouts that divide the model and the batch and fit the GPUs, the fastest first.

    Each TP, PP and micro-batch stands once, with the fastest recomputation that fits: the least, if nothing is
    offloaded. `tp`, `pp`, `micro_batch` fix one.
    Raises InputError when nothing divides, or nothing fits.
    """
    found, smallest = [], None
    for base in _dividing_layouts(job, cluster, tp, pp, micro_batch):
        fitting = []
        for recompute in RECOMPUTE:
            each = candidate(job, replace(base, recompute=recompute), cluster)
            if smallest is None or each.memory.total < smallest.memory.total:
                smallest = each
            if fits(each.memory, cluster.gpu):
                fitting.append(each)
        if fitting:
            found.append(min(fitting, key=lambda each: each.step_seconds))
    if smallest is None:
        raise InputError(
            f"no layout of {cluster.count} GPUs divides the model and its global batch of {job.global_batch} "
            "sequences: change --gpus, --tp, --pp or --micro-batch-size"
        )
    if not found:
        gib = 1 << 30
        raise InputError(
            f"nothing fits: the smallest layout, TP {smallest.layout.tp} x PP {smallest.layout.pp}, needs "
            f"{smallest.memory.total / gib:.1f} of {cluster.gpu.memory * (1 - RESERVED_SHARE) / gib:.1f} GiB per GPU: "
            "take more or larger GPUs"
        )
    return sorted(found, key=lambda each: _preference(each, job.seq_length))


def _preference(each: Candidate, seq_length: int) -> tuple[float, bool, int, int]:
    tokens = each.layout.micro_batch * seq_length
    large = tokens > _COMFORTABLE_TOKENS
    return round(each.step_seconds, 9), large, tokens if large else -tokens, each.memory.total


def _dividing_layouts(
    job: Job, cluster: Cluster, tp: int | None, pp: int | None, micro_batch: int | None
) -> Iterator[Layout]:
    model = job.model
    # The trainer refuses moments that are rounded by chance where two ranks have differing parts of the embedding.
    whole = job.savings.optimizer_states != "fp32" and model.tie_word_embeddings
    for tp_size in [tp] if tp else range(1, GPUS_PER_NODE + 1):
        for pp_size in [pp] if pp else range(1, model.num_layers + 1):
            dp_size, rest = divmod(cluster.count, tp_size * pp_size)
            if rest or job.global_batch % dp_size or not _divides(job.stored_model(tp_size), tp_size, pp_size):
                continue
            share = job.global_batch // dp_size
            for size in [micro_batch] if micro_batch else range(1, share + 1):
                if share % size == 0:
                    yield Layout(
                        tp=tp_size,
                        pp=pp_size,
                        dp=dp_size,
                        micro_batch=size,
                        sequence_parallel=tp_size > 1 and job.seq_length % tp_size == 0,
                        distributed_optimizer=dp_size > 1 and not (whole and pp_size > 1),
                    )


def _divides(model: ModelConfig, tp: int, pp: int) -> bool:
    try:
        model.check_layout(tp, pp)
    except InputError:
        return False
    return True


def _micro_batches(job: Job, layout: Layout) -> int:
    return job.global_batch // (layout.dp * layout.micro_batch)
