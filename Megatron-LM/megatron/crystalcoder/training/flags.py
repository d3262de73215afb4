"""Megatron-LM's flags -> TrainConfig: the front door of instruction tuning.

Every flag is either obeyed, or listed in `_WITHOUT_EFFECT` with the reason, or an error. What the checkpoint records
(sizes, muP constants, rotary style, LayerNorm epsilon) needs no flag; a flag that contradicts it is refused.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import Checkpoint, open_checkpoint
from megatron.crystalcoder.model.config import ModelConfig, MuP, ParallelConfig
from megatron.crystalcoder.model.lora import TARGETS, LoraSettings
from megatron.crystalcoder.training.config import DataSettings, OptimizerSettings, TrainConfig, WarmupDecay
from megatron.crystalcoder.training.resume import has_checkpoint, is_run
from megatron.crystalcoder.training.speed_flags import add_speed_arguments, with_speed_flags

# Flags that the reference's launch script passes and that change nothing here, with the reason.
_WITHOUT_EFFECT: dict[str, str] = {
    "--no-position-embedding": "there is never a learned position embedding",
    "--use-rotary-position-embeddings": "positions are always rotary",
    "--rotary-stay-fp32": "angles are always computed in fp32",
    "--use-flash-attn": "torch picks the attention kernel, flash where it can",
    "--no-query-key-layer-scaling": "scores are never scaled by layer",
    "--attention-softmax-in-fp32": "the softmax is always in fp32",
    "--swiglu": "the activation is always SwiGLU",
}
_WITHOUT_EFFECT_VALUES: dict[str, str] = {
    "--tokenizer-type": "rows hold token ids: no tokenizer is loaded",
    "--distributed-backend": "NCCL on GPUs, gloo on a CPU",
}
# Flags whose value is fixed for CrystalCoder: given, they must say this.
_FIXED: dict[str, tuple[float, str]] = {
    "--attention-dropout": (0.0, "CrystalCoder is trained without dropout"),
    "--hidden-dropout": (0.0, "CrystalCoder is trained without dropout"),
}
# flag -> the ModelConfig or MuP field that it speaks of
_MODEL_FLAGS: dict[str, tuple[str, type]] = {
    "--vocab-size": ("vocab_size", int),
    "--hidden-size": ("hidden_size", int),
    "--num-layers": ("num_layers", int),
    "--num-attention-heads": ("num_attention_heads", int),
    "--ffn-hidden-size": ("ffn_hidden_size", int),
    "--norm-epsilon": ("layernorm_epsilon", float),
    "--rotary-percent": ("rotary_percent", float),
    "--rotary-base": ("rotary_base", float),
}
_MUP_FLAGS: dict[str, tuple[str, type]] = {
    "--mup-width-scale": ("width_scale", float),
    "--mup-output-alpha": ("output_alpha", float),
    "--mup-embeddings-scale": ("embeddings_scale", float),
}


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Read the flags, and what the checkpoint records. Raises InputError (one line) on anything wrong."""
    flags = parser().parse_args(arguments)
    for flag, (value, reason) in _FIXED.items():
        if _value(flags, flag) not in (None, value):
            raise InputError(f"{flag} {_value(flags, flag):g}: it must be {value:g}, {reason}")
    if (flags.keep_best or flags.early_stop_patience) and not (flags.eval_interval and flags.valid_data_path):
        raise InputError("--keep-best and --early-stop-patience need --valid-data-path and --eval-interval: add them")
    checkpoint = _checkpoint(flags)
    model = _model(flags, checkpoint)
    parallel = _parallel(flags, checkpoint)
    model.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    config = TrainConfig(
        model=model,
        parallel=parallel,
        data=DataSettings(
            paths=tuple(flags.data_path),
            order=flags.dataloader_type,
            seed=flags.seed,
            data_sharding=not flags.no_data_sharding,
            num_workers=flags.num_workers,
            isolate_documents=flags.isolate_documents,
        ),
        schedule=_schedule(flags),
        optimizer=OptimizerSettings(
            adam_beta1=flags.adam_beta1,
            adam_beta2=flags.adam_beta2,
            adam_eps=flags.adam_eps,
            weight_decay=flags.weight_decay,
            clip_grad=flags.clip_grad,
            hidden_lr_scale=model.mup.width_scale,
            scale_hidden_biases=True,
        ),
        train_iters=flags.train_iters,
        micro_batch_size=flags.micro_batch_size,
        global_batch_size=flags.global_batch_size,
        seq_length=flags.seq_length,
        bf16=flags.bf16,
        loss_reduction=flags.loss_reduction,
        skip_nonfinite=flags.skip_nonfinite,
        seed=flags.seed,
        load=flags.load,
        save=flags.save,
        save_interval=flags.save_interval,
        save_format=flags.ckpt_format,
        load_optimizer=not flags.no_load_optim,
        load_rng=not flags.no_load_rng,
        lora=_lora(flags),
        finetune=flags.finetune,
        new_data_order=flags.new_data_order,
        exit_on_missing_checkpoint=flags.exit_on_missing_checkpoint,
        eval_data=tuple(DataSettings(paths=(path,), order="single") for path in flags.valid_data_path),
        eval_interval=flags.eval_interval,
        eval_iters=flags.eval_iters,
        keep_best=flags.keep_best,
        early_stop_patience=flags.early_stop_patience,
        early_stop_min_delta=flags.early_stop_min_delta,
        log_interval=flags.log_interval,
        log_params_norm=flags.log_params_norm,
        log_memory=flags.log_memory_to_tensorboard,
        log_timers=flags.log_timers_to_tensorboard,
        tensorboard_dir=flags.tensorboard_dir,
        tensorboard_queue_size=flags.tensorboard_queue_size,
    )
    return with_speed_flags(config, flags)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def parser() -> argparse.ArgumentParser:
    """Every flag there is. Abbreviations are not accepted: a mistyped flag must not become another one."""
    top = _Parser(prog="pretrain_crystalcoder_inst.py", description=__doc__, allow_abbrev=False)
    _add_model(top.add_argument_group("model", "taken from the checkpoint; where given, they must agree with it"))
    _add_batch(top.add_argument_group("batch and data"))
    _add_optimizer(top.add_argument_group("optimizer, schedule, loss"))
    _add_lora(top.add_argument_group("LoRA", "an adapter is trained beside frozen weights"))
    _add_parallel(top.add_argument_group("layout over ranks"))
    add_speed_arguments(top.add_argument_group("speed and memory, the result being the same"))
    _add_checkpoint(top.add_argument_group("checkpoints"))
    _add_logging(top.add_argument_group("evaluation and logging"))
    ignored = top.add_argument_group("accepted, without effect", "the reference's launch script passes them")
    for flag, reason in _WITHOUT_EFFECT.items():
        ignored.add_argument(flag, action="store_true", help=reason)
    for flag, reason in _WITHOUT_EFFECT_VALUES.items():
        ignored.add_argument(flag, help=reason)
    for flag, (value, reason) in _FIXED.items():
        ignored.add_argument(flag, type=float, help=f"must be {value:g}: {reason}")
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _number(kind: type, low: float, below: float = math.inf) -> Any:
    """A type for argparse: an int or float from `low` on (NaN never) and below `below`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < below:
            limit = f" and below {below:g}" if math.isfinite(below) else ", and finite" if kind is float else ""
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g}{limit}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


_count, _amount, _share = _number(int, 0), _number(float, 0.0), _number(float, 0.0, 1.0)


def _add_model(group: Any) -> None:
    group.add_argument("--use-checkpoint-args", action="store_true", help="sizes from the checkpoint need no flags")
    for flag, (_, kind) in {**_MODEL_FLAGS, **_MUP_FLAGS}.items():
        group.add_argument(flag, type=kind)
    group.add_argument(
        "--max-position-embeddings", type=_positive, help="longest sequence, where the checkpoint's is shorter"
    )
    group.add_argument("--rotary-interleave-repeat", action="store_true", help="rotary turns neighbouring pairs")
    group.add_argument("--use-mup", action="store_true", help="allows the --mup flags")
    group.add_argument("--mup-scale-qk-dot-by-d", action="store_true", help="scores are q.k / d")


def _add_batch(group: Any) -> None:
    group.add_argument(
        "--data-path", type=Path, nargs="+", required=True, metavar="PATH", help="rows: .jsonl, .h5, or directories"
    )
    group.add_argument("--seq-length", type=_positive, required=True, help="tokens per row")
    group.add_argument(
        "--micro-batch-size", type=_positive, required=True, help="rows per forward pass and data-parallel rank"
    )
    group.add_argument("--global-batch-size", type=_positive, required=True, help="rows per optimizer step")
    group.add_argument(
        "--dataloader-type",
        choices=("cyclic", "single", "shuffled"),
        default="shuffled",
        help="cyclic: the reference's order exactly; single: first row to last; shuffled (default): a fresh "
        "permutation per epoch from --seed, whatever the micro-batch size and data parallelism, no row dropped",
    )
    group.add_argument("--no-data-sharding", action="store_true", help="cyclic: ranks deal one permutation among them")
    group.add_argument("--num-workers", type=_count, default=0, help="processes per rank that read rows ahead")
    group.add_argument(
        "--isolate-documents",
        action="store_true",
        help="for rows of whole documents (finetune prepare --packing best-fit): each on its own",
    )
    group.add_argument("--seed", type=int, default=1234)


def _add_optimizer(group: Any) -> None:
    group.add_argument(
        "--train-iters", type=_positive, required=True, help="optimizer steps in all, earlier parts included"
    )
    group.add_argument("--lr", type=_amount, required=True, help="of the embedding and norms; muP scales the others'")
    group.add_argument("--min-lr", type=_amount, default=0.0)
    group.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine"), default="linear")
    group.add_argument("--lr-decay-iters", type=_positive, help="default: --train-iters")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--lr-warmup-fraction", type=_amount, help="of the decay iterations; step 1 then runs at lr 0")
    warmup.add_argument("--lr-warmup-iters", type=_count, default=0)
    group.add_argument("--weight-decay", type=_amount, default=0.01, help="on matrices only")
    group.add_argument("--clip-grad", type=_amount, default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--adam-beta1", type=_share, default=0.9)
    group.add_argument("--adam-beta2", type=_share, default=0.999)
    group.add_argument("--adam-eps", type=_amount, default=1e-8)
    group.add_argument("--bf16", action="store_true", help="bf16 weights with fp32 copies; else fp32")
    group.add_argument(
        "--loss-reduction",
        choices=("token", "micro_batch"),
        default="token",
        help="token (default): each unmasked token of the global batch weighs the same; micro_batch: mean over "
        "micro-batches of each one's token mean, as the reference does",
    )
    group.add_argument("--skip-nonfinite", action="store_true", help="leave out steps with a NaN instead of stopping")


def _add_lora(group: Any) -> None:
    group.add_argument("--lora-rank", type=int, default=0, help="0: train all weights")
    group.add_argument(
        "--lora-alpha", type=_amount, help="the adapter's product counts alpha / rank; default: 2 x rank"
    )
    group.add_argument(
        "--lora-target-modules", nargs="+", metavar="LAYER", help=f"of {', '.join(TARGETS)}; default: all of them"
    )


def _add_parallel(group: Any) -> None:
    group.add_argument("--tensor-model-parallel-size", type=_positive, help="default: the checkpoint's")
    group.add_argument("--pipeline-model-parallel-size", type=_positive, help="default: the checkpoint's")
    group.add_argument("--sequence-parallel", action="store_true", help="off where tensor parallelism is 1")
    group.add_argument(
        "--use-distributed-optimizer", action="store_true", help="shard Adam's state over data parallelism"
    )
    group.add_argument(
        "--recompute-granularity", choices=("selective", "full"), help="recompute activations, to save memory"
    )


def _add_checkpoint(group: Any) -> None:
    group.add_argument("--load", type=Path, help="checkpoint to start from (any format, also a Hugging Face directory)")
    group.add_argument("--save", type=Path, help="where checkpoints and metrics go; a run found here is continued")
    group.add_argument(
        "--save-interval", type=_count, default=0, help="iterations between checkpoints; 0: at the end only"
    )
    group.add_argument("--ckpt-format", choices=("torch_dist", "torch"), default="torch_dist", help="format to save in")
    group.add_argument("--finetune", action="store_true", help="take --load's weights alone and begin at iteration 0")
    group.add_argument("--new-data-order", action="store_true", help="let a run that is continued go on in other data")
    group.add_argument("--no-load-optim", action="store_true", help="leave Adam's moments behind")
    group.add_argument("--no-load-rng", action="store_true", help="leave the random state behind")
    group.add_argument(
        "--exit-on-missing-checkpoint", action="store_true", help="instead of starting from random weights"
    )


def _add_logging(group: Any) -> None:
    group.add_argument(
        "--valid-data-path",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="rows to evaluate on, each path by itself",
    )
    group.add_argument(
        "--eval-interval", type=_count, default=0, help="iterations between evaluations on --valid-data-path"
    )
    group.add_argument("--eval-iters", type=_count, default=0, help="global batches per evaluation; 0: all rows")
    group.add_argument("--keep-best", action="store_true", help="keep the lowest loss's checkpoint in SAVE/best")
    group.add_argument(
        "--early-stop-patience",
        type=_count,
        default=0,
        help="end after so many evaluations without a lower loss; 0: never",
    )
    group.add_argument(
        "--early-stop-min-delta", type=_amount, default=0.0, help="by how much a lower loss must be lower"
    )
    group.add_argument("--log-interval", type=_positive, default=1)
    group.add_argument("--log-params-norm", action="store_true")
    group.add_argument("--tensorboard-dir", type=Path)
    group.add_argument("--tensorboard-queue-size", type=int, default=10)
    group.add_argument("--log-timers-to-tensorboard", action="store_true", help="seconds per iteration")
    group.add_argument(
        "--log-memory-to-tensorboard", action="store_true", help="peak memory of rank 0, as in metrics.jsonl"
    )


def _checkpoint(flags: argparse.Namespace) -> Checkpoint | None:
    """What is there to take sizes from: the run in --save that would go on, else --load."""
    for path in (flags.save, flags.load):
        if path is not None and has_checkpoint(path):
            found = open_checkpoint(path)
            if path == flags.load or is_run(found):
                return found
    if flags.load is not None and (flags.exit_on_missing_checkpoint or flags.use_checkpoint_args):
        return open_checkpoint(flags.load)  # says what is missing
    if flags.exit_on_missing_checkpoint or flags.use_checkpoint_args:
        raise InputError("no checkpoint is named: give --load")
    return None


def _model(flags: argparse.Namespace, checkpoint: Checkpoint | None) -> ModelConfig:
    given = {field: value for flag, (field, _) in _MODEL_FLAGS.items() if (value := _value(flags, flag)) is not None}
    mup = {field: value for flag, (field, _) in _MUP_FLAGS.items() if (value := _value(flags, flag)) is not None}
    if flags.mup_scale_qk_dot_by_d:
        mup["scale_qk_dot_by_d"] = True
    if mup and not flags.use_mup:
        raise InputError("the --mup flags need --use-mup: add it, or drop them")
    if checkpoint is None:
        return _model_from_flags(flags, given, mup)

    recorded = checkpoint.config
    if not checkpoint.mup_recorded:
        if not flags.use_mup:
            raise InputError(
                f"{checkpoint.path}: the checkpoint does not record its muP constants: give --use-mup "
                "--mup-width-scale --mup-output-alpha --mup-embeddings-scale [--mup-scale-qk-dot-by-d], or convert it "
                "with a --hf-config-path that has them"
            )
        epsilon = given.get("layernorm_epsilon", recorded.layernorm_epsilon)
        recorded = replace(recorded, mup=MuP(**mup), layernorm_epsilon=epsilon)
    for flag, (field, _) in _MODEL_FLAGS.items():
        _agree(flag, given.get(field), getattr(recorded, field), checkpoint)
    for flag, (field, _) in _MUP_FLAGS.items():
        _agree(flag, mup.get(field), getattr(recorded.mup, field), checkpoint)
    if flags.mup_scale_qk_dot_by_d:
        _agree("--mup-scale-qk-dot-by-d", True, recorded.mup.scale_qk_dot_by_d, checkpoint)
    if flags.rotary_interleave_repeat:
        _agree("--rotary-interleave-repeat", True, recorded.rotary_interleaved, checkpoint)
    return replace(recorded, max_sequence_length=max(recorded.max_sequence_length, flags.max_position_embeddings or 0))


def _model_from_flags(flags: argparse.Namespace, given: dict[str, Any], mup: dict[str, Any]) -> ModelConfig:
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size")
    missing = [flag for flag, (field, _) in _MODEL_FLAGS.items() if field in sizes and field not in given]
    if missing:
        where = f"{flags.load}: no checkpoint there" if flags.load else "no checkpoint"
        raise InputError(f"{where} to take the sizes from: give --load one, or {' '.join(missing)}")
    head_dim = given["hidden_size"] // given["num_attention_heads"]
    percent = given.pop("rotary_percent", 1.0)
    return ModelConfig(
        **given,
        rotary_dim=round(head_dim * percent),
        rotary_interleaved=flags.rotary_interleave_repeat,
        max_sequence_length=flags.max_position_embeddings or flags.seq_length,
        mup=MuP(**mup),
    )


def _value(flags: argparse.Namespace, flag: str) -> Any:
    return getattr(flags, flag.removeprefix("--").replace("-", "_"))


def _agree(flag: str, given: Any, recorded: Any, checkpoint: Checkpoint) -> None:
    if given is not None and given != recorded:
        raise InputError(
            f"{checkpoint.path}: {flag} {given} contradicts the checkpoint, which records {recorded}: drop the flag, "
            "or load another checkpoint"
        )


def _parallel(flags: argparse.Namespace, checkpoint: Checkpoint | None) -> ParallelConfig:
    tp = flags.tensor_model_parallel_size or (checkpoint.tensor_parallel if checkpoint else 1)
    pp = flags.pipeline_model_parallel_size or (checkpoint.pipeline_parallel if checkpoint else 1)
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=flags.sequence_parallel and tp > 1,
        use_distributed_optimizer=flags.use_distributed_optimizer,
        recompute=flags.recompute_granularity or "none",
    )


def _lora(flags: argparse.Namespace) -> LoraSettings | None:
    if not flags.lora_rank:
        if flags.lora_alpha is not None or flags.lora_target_modules is not None:
            raise InputError("--lora-alpha and --lora-target-modules need --lora-rank: add it, or drop them")
        return None
    if flags.ckpt_format != "torch_dist":
        raise InputError("an adapter is saved in torch_dist alone: drop --ckpt-format")
    alpha = 2.0 * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha
    return LoraSettings(flags.lora_rank, alpha, tuple(flags.lora_target_modules or TARGETS))


def _schedule(flags: argparse.Namespace) -> WarmupDecay:
    decay = (flags.lr_decay_iters or flags.train_iters) * flags.global_batch_size
    warmup = flags.lr_warmup_iters * flags.global_batch_size
    if flags.lr_warmup_fraction is not None:
        warmup = flags.lr_warmup_fraction * decay
    return WarmupDecay(flags.lr, flags.min_lr, warmup, decay, flags.lr_decay_style)
