"""Megatron's flags: what each becomes, and the one line that a wrong one gets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.directory import RANK_FILE
from megatron.crystalcoder.model.config import MuP, ParallelConfig
from megatron.crystalcoder.training import flags
from megatron.crystalcoder.training.config import TrainConfig, WarmupDecay
from support.checkpoints import distinct_weights, save_hf
from support.reference_model import TINY

REQUIRED = (
    "--data-path rows.jsonl --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 1e-3"
)
MUP = "--use-mup --mup-width-scale 0.25 --mup-output-alpha 2.22 --mup-embeddings-scale 14.6 --mup-scale-qk-dot-by-d"
# What the reference's own launch script passes, with the sizes of the tiny model.
REFERENCE = f"""
    --seq-length 32 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --tokenizer-type NullTokenizer --vocab-size 256 --exit-on-missing-checkpoint --use-checkpoint-args
    --no-load-optim --no-load-rng --bf16 --no-position-embedding --use-rotary-position-embeddings --rotary-percent 0.25
    --rotary-interleave-repeat --rotary-stay-fp32 --norm-epsilon 1e-5 --use-flash-attn --no-query-key-layer-scaling
    --train-iters 1600 --lr-decay-iters 1600 --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.001
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --data-path rows.jsonl --dataloader-type cyclic --seed 42 --log-interval 1 --save-interval 100
    --eval-interval 2000 --eval-iters 10 --distributed-backend nccl --overlap-grad-reduce --sequence-parallel
    --attention-dropout 0 --hidden-dropout 0 --attention-softmax-in-fp32 {MUP}
    --tensorboard-dir logs --tensorboard-queue-size 10 --log-timers-to-tensorboard --log-memory-to-tensorboard
    --log-params-norm
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    hf = save_hf(folder / "hf", distinct_weights(), shards=1)
    convert(hf, folder / "megatron", format="torch", tensor_parallel=2, pipeline_parallel=2)
    return folder / "megatron"


def parse(text: str, load: Path | None = None) -> TrainConfig:
    return flags.parse([*text.split(), *(["--load", str(load), "--save", str(load)] if load else [])])


def refusal(text: str, load: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        parse(text, load)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_references_flags(checkpoint: Path) -> None:
    config = parse(REFERENCE, checkpoint)
    assert config.model == TINY
    assert config.parallel == ParallelConfig(2, 2, sequence_parallel=True, overlap_grad_reduce=True)
    assert config.schedule == WarmupDecay(2e-4, 2e-5, 0.001 * 1600 * 8, 1600 * 8, "cosine")
    assert config.optimizer.hidden_lr_scale == 0.25
    assert config.optimizer.scale_hidden_biases
    assert (config.data.order, config.data.seed, config.data.data_sharding) == ("cyclic", 42, True)
    assert (config.bf16, config.load_optimizer, config.load_rng, config.finetune) == (True, False, False, False)
    assert (config.loss_reduction, config.save_format) == ("token", "torch_dist")
    assert config.log_params_norm
    assert config.log_memory
    assert config.log_timers
    assert config.eval_data == ()


def test_sizes_come_from_the_checkpoint(checkpoint: Path) -> None:
    """Megatron or Hugging Face; TP and PP too, unless the flags say otherwise."""
    assert parse(REQUIRED, checkpoint).model == TINY
    assert parse(REQUIRED, checkpoint).parallel.tensor_model_parallel_size == 2
    other = parse(f"{REQUIRED} --tensor-model-parallel-size 1 --sequence-parallel", checkpoint).parallel
    assert other == ParallelConfig(1, 2, sequence_parallel=False)
    assert parse(REQUIRED, checkpoint.parent / "hf").model == TINY
    assert parse(f"{REQUIRED} --max-position-embeddings 32", checkpoint).model == TINY
    longer = parse(f"{REQUIRED} --max-position-embeddings 128", checkpoint).model
    assert longer == replace(TINY, max_sequence_length=128)


def test_sizes_from_flags() -> None:
    sizes = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 172 --vocab-size 256"
    rotary = "--rotary-percent 0.25 --rotary-interleave-repeat --max-position-embeddings 64"
    assert parse(f"{REQUIRED} {sizes} {rotary} {MUP}").model == TINY
    assert "--ffn-hidden-size" in refusal(f"{REQUIRED} --num-layers 4 --hidden-size 64 --num-attention-heads 4")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--mup-width-scal 0.5", ["unrecognized", "--mup-width-scal"]),
        ("--no-such-flag", ["unrecognized", "--no-such-flag"]),
        ("--micro-batch-size zero", ["--micro-batch-size"]),
        ("--micro-batch-size 0", ["--micro-batch-size", "less than 1"]),
        ("--vocab-size 32032", ["--vocab-size 32032", "256"]),
        ("--num-layers 8", ["--num-layers 8", "4"]),
        ("--norm-epsilon 1e-6", ["--norm-epsilon 1e-06", "1e-05"]),
        ("--rotary-percent 0.5", ["--rotary-percent 0.5", "0.25"]),
        ("--use-mup --mup-width-scale 0.0625", ["--mup-width-scale 0.0625", "0.25"]),
        ("--use-mup --mup-output-alpha 1", ["--mup-output-alpha 1.0", "2.22"]),
        ("--mup-width-scale 0.25", ["--use-mup"]),
        ("--attention-dropout 0.1", ["--attention-dropout 0.1", "must be 0"]),
        ("--tensor-model-parallel-size 3", ["tensor parallel size 3", "attention heads (4)", "1, 2, 4"]),
        ("--pipeline-model-parallel-size 3", ["pipeline parallel size 3", "4 layers"]),
        ("--lr -1", ["--lr", "-1: must be at least 0"]),
        ("--weight-decay nan", ["--weight-decay", "nan: must be"]),
        ("--clip-grad inf", ["--clip-grad", "and finite"]),
        ("--adam-beta2 1", ["--adam-beta2", "1: must be at least 0 and below 1"]),
        ("--adam-eps small", ["--adam-eps", "invalid float value: 'small'"]),
        ("--save-interval -5", ["--save-interval", "-5: must be at least 0"]),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 3", ["--lr-warmup-iters", "not allowed"]),
    ],
)
def test_refused_in_one_line(checkpoint: Path, extra: str, words: list[str]) -> None:
    message = refusal(f"{REQUIRED} {extra}", checkpoint)
    for word in words:
        assert word in message


def test_missing_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    assert str(missing) in refusal(f"{REQUIRED} --exit-on-missing-checkpoint", missing)
    assert str(missing) in refusal(f"{REQUIRED} --use-checkpoint-args", missing)
    assert f"{missing}: no checkpoint there" in refusal(REQUIRED, missing)
    assert "--load" in refusal(f"{REQUIRED} --exit-on-missing-checkpoint")
    assert not missing.exists()


def test_checkpoint_that_does_not_record_mup(checkpoint: Path, tmp_path: Path) -> None:
    """As the reference's converter leaves it: the flags must say the constants, and are believed."""
    shutil.copytree(checkpoint, tmp_path / "silent")
    for file in (tmp_path / "silent").rglob(RANK_FILE):
        state = torch.load(file, weights_only=False)
        for name in [name for name in vars(state["args"]) if "mup" in name or name.startswith("rotary_interleave")]:
            delattr(state["args"], name)
        torch.save(state, file)
    assert "--use-mup" in refusal(REQUIRED, tmp_path / "silent")
    assert parse(f"{REQUIRED} {MUP}", tmp_path / "silent").model == TINY
    assert parse(f"{REQUIRED} --use-mup --mup-width-scale 0.5", tmp_path / "silent").model.mup == MuP(width_scale=0.5)


def test_every_flag_is_told() -> None:
    told = flags.parser().format_help()
    assert "accepted, without effect" in told
    assert "--rotary-stay-fp32" in told
