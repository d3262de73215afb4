"""Ways to train the same model on the same rows: this trainer, compiled or not, a plain loop, transformers.Trainer.

Each takes one step after the other and calls `done` with the step's loss after each; `done` returns when the next step
is wanted. All start from the same weights, and nothing else is left to chance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig, MuP, ParallelConfig
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.training.config import DataSettings, TrainConfig, WarmupDecay

Done = Callable[[float], None]

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
SEQUENCE, MICRO_BATCH, GLOBAL_BATCH, LR = 512, 2, 4, 1e-3


def config(rows: Path, *, bf16: bool) -> TrainConfig:
    """The run that every way makes."""
    return TrainConfig(
        model=MODEL,
        data=DataSettings(paths=(rows,), order="single"),
        schedule=WarmupDecay(LR, LR, 0, 1, "constant"),
        train_iters=10**6,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=GLOBAL_BATCH,
        seq_length=SEQUENCE,
        bf16=bf16,
    )


def this_trainer(config: TrainConfig, done: Done) -> None:
    """The trainer's own step, alone or as one of several tensor-parallel ranks."""
    import torch.distributed as dist

    from megatron.crystalcoder import platform

    platform.initialize()
    config = replace(config, parallel=ParallelConfig(tensor_model_parallel_size=dist.get_world_size()))
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import train_step

    platform.initialize_model_parallel(config.parallel, config.seed)
    model, optimizer = build(config, Start("new weights", _weights()))
    data = _batches(config)
    while True:
        done(train_step(model, optimizer, data, config, lr=LR).lm_loss)


def compiled(config: TrainConfig, done: Done) -> None:
    """The same with `--compile ops`."""
    this_trainer(replace(config, speed=Speed(compile="ops")), done)


def unfused(config: TrainConfig, done: Done) -> None:
    """The same with `--fusions none`."""
    this_trainer(replace(config, speed=Speed(frozenset())), done)


def plain_pytorch(config: TrainConfig, done: Done) -> None:
    """What one writes by hand: the Hugging Face model, torch's fused AdamW, gradient accumulation, clipping."""
    model, settings = _hugging_face_model(), config.optimizer
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=LR,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )
    micro_steps = GLOBAL_BATCH // MICRO_BATCH
    data = _batches(config)
    while True:
        optimizer.zero_grad()
        total = 0.0
        for _, batch in zip(range(micro_steps), data, strict=False):
            with torch.autocast("cpu", torch.bfloat16) if config.bf16 else nullcontext():
                logits = model(batch["tokens"], use_cache=False).logits
                loss = _cross_entropy(logits, batch["labels"]) / micro_steps
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        done(total)


def transformers_trainer(config: TrainConfig, done: Done) -> None:
    """transformers.Trainer on the Hugging Face model."""
    require_accelerate()
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []
    micro_steps = GLOBAL_BATCH // MICRO_BATCH

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        # The labels are each token's next one already, so nothing is shifted; the Trainer divides by nothing here.
        loss = _cross_entropy(outputs["logits"], labels) / micro_steps
        losses.append(float(loss.detach()))
        return loss

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done(sum(losses))
            losses.clear()

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in _batches(config):
                for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
                    yield {"input_ids": tokens, "labels": labels}

    settings = config.optimizer
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        max_steps=config.train_iters,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=micro_steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_eps,
        max_grad_norm=settings.clip_grad,
        optim="adamw_torch_fused",
        bf16=config.bf16,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(
        model=_hugging_face_model(),
        args=arguments,
        train_dataset=Rows(),
        compute_loss_func=loss_of,
        callbacks=[AfterEachStep()],
    ).train()


def require_accelerate() -> None:
    """Raise InputError unless transformers.Trainer can run."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise InputError(
            "transformers.Trainer needs accelerate, which is not installed: "
            "pip install -c requirements/constraints.txt -e '.[bench]'"
        ) from None


def _weights() -> Any:
    from megatron.crystalcoder.checkpoint.random_init import RandomWeights
    from megatron.crystalcoder.model.initialization import InitSettings

    return RandomWeights(MODEL, InitSettings.for_hf(MODEL), seed=1)


def _hugging_face_model() -> Any:
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
    weights = _weights()
    model.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=False)
    return model.train()


def _batches(config: TrainConfig) -> Iterator[dict[str, Tensor]]:
    from megatron.crystalcoder.data.loader import micro_batches, open_data

    rows, order = open_data(config.data, seq_length=SEQUENCE, vocab_size=MODEL.vocab_size)
    return micro_batches(rows, order, consumed_samples=0, micro_batch_size=MICRO_BATCH, dp_rank=0, dp_size=1)


def _cross_entropy(logits_bsv: Tensor, labels_bs: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_bsv.flatten(0, 1).float(), labels_bs.flatten())
