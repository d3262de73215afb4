"""A training step against a plain PyTorch loop on the Hugging Face model: same weights, rows, precision, threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_prep.sequences import SequenceWriter
from megatron.crystalcoder import platform
from megatron.crystalcoder.checkpoint.random_init import RandomWeights
from megatron.crystalcoder.checkpoint.weights import WeightSource
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.model.config import ModelConfig, MuP
from megatron.crystalcoder.model.initialization import InitSettings
from megatron.crystalcoder.training.config import DataSettings, TrainConfig, WarmupDecay
from megatron.crystalcoder.training.loop import build
from megatron.crystalcoder.training.resume import Start
from megatron.crystalcoder.training.step import train_step
from tools.bench.report import Table, interleaved

# About 30 million parameters: small enough for a laptop, large enough that matrix products are most of the time.
MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_attention_heads=8,
    ffn_hidden_size=1364,
    rotary_dim=16,
    mup=MuP(width_scale=0.5, output_alpha=2.22, embeddings_scale=14.6, scale_qk_dot_by_d=True),
)
SEQUENCE, MICRO_BATCH, GLOBAL_BATCH, LR, ROUNDS = 512, 2, 4, 1e-3, 6


def measure() -> Table:
    """Seconds of one step each way, in turn, and the losses of the same steps."""
    platform.initialize()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(_rows(Path(folder)))
        platform.initialize_model_parallel(config.parallel, config.seed)
        weights = RandomWeights(MODEL, InitSettings.for_hf(MODEL), seed=1)
        losses: dict[str, list[float]] = {"this trainer": [], "plain PyTorch": []}
        here, plain = _trainer_step(config, weights), _plain_step(config, weights)
        seconds = interleaved(
            {
                "this trainer": lambda: losses["this trainer"].append(here()),
                "plain PyTorch": lambda: losses["plain PyTorch"].append(plain()),
            },
            ROUNDS,
        )
    tokens = GLOBAL_BATCH * SEQUENCE
    base = seconds["plain PyTorch"]
    return Table(
        "train",
        "Training step",
        f"{MODEL.num_parameters / 1e6:.0f}M parameters, sequence {SEQUENCE}, global batch {GLOBAL_BATCH} in "
        f"micro-batches of {MICRO_BATCH}, fp32, {torch.get_num_threads()} threads, one rank; "
        f"best of {ROUNDS} steps, taken in turn.",
        ("way", "s / step", "tokens / s", "ratio to plain", "loss at the last step"),
        [
            (name, f"{s:.3f}", f"{tokens / s:,.0f}", f"{s / base:.2f}", f"{losses[name][-1]:.5f}")
            for name, s in seconds.items()
        ],
    )


def _rows(folder: Path) -> Path:
    path = folder / "rows.h5"
    ids = np.random.default_rng(0).integers(3, MODEL.vocab_size, (32, SEQUENCE + 1), dtype=np.int32)
    with SequenceWriter(path, SEQUENCE) as writer:
        writer.write(np.stack([ids[:, :-1], np.ones_like(ids[:, 1:]), ids[:, 1:]], axis=1))
    return path


def _config(path: Path) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        data=DataSettings(paths=(path,), order="single"),
        schedule=WarmupDecay(LR, LR, 0, 1, "constant"),
        train_iters=ROUNDS,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=GLOBAL_BATCH,
        seq_length=SEQUENCE,
    )


def _batches(config: TrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    rows, order = open_data(config.data, seq_length=SEQUENCE, vocab_size=MODEL.vocab_size)
    return micro_batches(rows, order, consumed_samples=0, micro_batch_size=MICRO_BATCH, dp_rank=0, dp_size=1)


def _trainer_step(config: TrainConfig, weights: WeightSource) -> Callable[[], float]:
    model, optimizer = build(config, Start("new weights", weights))
    data = _batches(config)
    return lambda: train_step(model, optimizer, data, config, lr=LR).lm_loss


def _plain_step(config: TrainConfig, weights: WeightSource) -> Callable[[], float]:
    """What one writes by hand: the Hugging Face model, torch's fused AdamW, gradient accumulation, clipping."""
    from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel

    model = CrystalCoderLMHeadModel(
        CrystalCoderConfig(
            vocab_size=MODEL.vocab_size,
            n_positions=MODEL.max_sequence_length,
            n_embd=MODEL.hidden_size,
            n_layer=MODEL.num_layers,
            n_head=MODEL.num_attention_heads,
            n_inner=MODEL.ffn_hidden_size,
            rotary_dim=MODEL.rotary_dim,
            mup_width_scale=MODEL.mup.width_scale,
        )
    )
    model.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=False)
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=LR,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )
    data = _batches(config)
    micro_steps = GLOBAL_BATCH // MICRO_BATCH

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for _, batch in zip(range(micro_steps), data, strict=False):
            logits = model(batch["tokens"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / micro_steps
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        return total

    return step
