"""Convert checkpoints with Megatron-LM's flags: Hugging Face to Megatron, back, and Megatron to another TP and PP.

    python Megatron-LM/tools/checkpoint/util.py --model-type GPT --loader crystalcoder_hf --saver megatron \\
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 4 --load-dir HF --save-dir MEGATRON
    python Megatron-LM/tools/checkpoint/util.py --model-type GPT --loader megatron --saver crystalcoder_hf \\
        --load-dir MEGATRON --save-dir HF --hf-config-path CrystalCoder

Needs no GPU and builds no model. `crystalcoder convert` does the same with shorter flags.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import InputError, exits_on_bad_input
from megatron.crystalcoder.checkpoint.convert import DTYPES, convert
from megatron.crystalcoder.checkpoint.hf_config import resolve_hf_config_path
from megatron.crystalcoder.checkpoint.hub import open_source
from megatron.crystalcoder.checkpoint.transfer import MAX_QUEUE_SIZE

# Flags that belong to one loader or saver, as in the reference: given with another they are refused, not ignored.
_PLUGIN_FLAGS = {
    "loader crystalcoder_hf": ("tokenizer_model",),
    "loader megatron": ("vocab_file",),
    "saver megatron": (
        "target_tensor_parallel_size",
        "target_pipeline_parallel_size",
        "target_virtual_pipeline_parallel_size",
        "make_vocab_size_divisible_by",
        "release",
        "save_format",
        "saver_transformer_impl",
    ),
    "saver crystalcoder_hf": ("hf_config_path",),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert checkpoints between Hugging Face and Megatron, at any TP and PP.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model-type", required=True, choices=["GPT"], help="the kind of model")
    plugins = ["crystalcoder_hf", "megatron"]
    add("--loader", required=True, type=_plugin("loader_"), choices=plugins, help="format of the source")
    add("--saver", required=True, type=_plugin("saver_"), choices=plugins, help="format of the target")
    add("--load-dir", required=True, help="the source: a checkpoint's directory, or OWNER/NAME[@REVISION] on the hub")
    add("--save-dir", required=True, type=Path, help="the directory to write; must not exist yet")
    add("--dtype", choices=DTYPES, help="cast to this dtype (default: keep what is stored, so a round trip is exact)")
    add("--overwrite", action="store_true", help="replace --save-dir, once the new checkpoint is complete")
    add("--no-checking", action="store_true", help="do not read the result back to compare it, nor compare logits")
    add("--true-vocab-size", type=int, help="rows of the vocabulary that count; a Megatron source's others are padding")
    add("--max-queue-size", type=int, default=MAX_QUEUE_SIZE, help="most tensors in work at a time (default: 50)")
    add("--workers", type=int, help="threads (default: one a core, 4 at most)")
    add("--megatron-path", type=Path, help="for old command lines: checked to hold a Megatron-LM, which is not needed")
    saver = parser.add_argument_group("--saver megatron")
    saver.add_argument("--target-tensor-parallel-size", type=int, help="default: the source's, or 1")
    saver.add_argument("--target-pipeline-parallel-size", type=int, help="default: the source's, or 1")
    saver.add_argument("--target-virtual-pipeline-parallel-size", type=int, help="default: the source's, or none")
    saver.add_argument("--make-vocab-size-divisible-by", type=int, help="pad the vocabulary to this times TP")
    saver.add_argument("--release", action="store_true", default=None, help="write `release`: weights of no iteration")
    formats = ["torch", "torch_dist", "legacy"]
    saver.add_argument("--save-format", choices=formats, help="default: torch; legacy: the reference's names")
    saver.add_argument(
        "--saver-transformer-impl",
        choices=["local", "transformer_engine"],
        help="whose names the norms get in format torch (default: local); torch_dist loads with either",
    )
    hf_saver = parser.add_argument_group("--saver crystalcoder_hf")
    hf_saver.add_argument(
        "--hf-config-path",
        help="directory with config.json and tokenizer, or `CrystalCoder` for the packaged one. The checkpoint's own "
        "sizes and muP constants count; a directory that is not the packaged one must agree with them. Needed for "
        "checkpoints of the reference's converter, which do not record muP (with --saver megatron too)",
    )
    parser.add_argument_group("--loader crystalcoder_hf").add_argument(
        "--tokenizer-model",
        type=Path,
        help="tokenizer to put beside the weights: its directory or file (default: the source's)",
    )
    parser.add_argument_group("--loader megatron").add_argument(
        "--vocab-file",
        type=Path,
        help="JSON of tokens and ids (vocab.json, tokenizer.json); as many rows count, as with --true-vocab-size",
    )
    return parser


def _plugin(prefix: str) -> Callable[[str], str]:
    """A plug-in's name, or its module's: `megatron` or `loader_megatron`."""
    return lambda name: name.removeprefix(prefix)


def _vocabulary_size(file: Path) -> int:
    """How many tokens a vocabulary has: one JSON object of tokens and ids, or a tokenizer.json."""
    try:
        content = json.loads(file.read_text())
        if "model" in content:
            vocabulary = dict(content["model"]["vocab"])
            content = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return max(map(int, content.values())) + 1
    except OSError as error:
        raise InputError(f"--vocab-file {file}: cannot be read ({error.strerror}): correct the path") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"--vocab-file {file}: is no JSON object of tokens and ids: give vocab.json") from error


@exits_on_bad_input
def main(arguments: list[str] | None = None) -> None:
    """Parse the flags and convert. An unknown flag, like any wrong one, exits with 2."""
    parser = _parser()
    args = parser.parse_args(arguments)
    for plugin, flags in _PLUGIN_FLAGS.items():
        role, name = plugin.split()
        for flag in flags:
            # Legacy checkpoints record no muP: from them, config.json is wanted for a Megatron target too.
            if flag == "hf_config_path" and args.loader == "megatron":
                continue
            if getattr(args, flag) is not None and getattr(args, role) != name:
                parser.error(f"--{flag.replace('_', '-')} belongs to --{plugin}, not to --{role} {getattr(args, role)}")
    for flag in ("max_queue_size", "workers", "true_vocab_size", *_PLUGIN_FLAGS["saver megatron"]):
        if isinstance(value := getattr(args, flag), int) and value < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    if args.megatron_path is not None and not (args.megatron_path / "megatron").is_dir():
        raise InputError(
            f"--megatron-path {args.megatron_path}: holds no `megatron` directory: correct it, or drop it "
            "(no Megatron-LM is needed)"
        )
    vocab_size = args.true_vocab_size
    if args.vocab_file is not None:
        vocab_size = _vocabulary_size(args.vocab_file)
        if args.true_vocab_size not in (None, vocab_size):
            raise InputError(
                f"--vocab-file {args.vocab_file}: has {vocab_size} tokens, not the {args.true_vocab_size} of "
                "--true-vocab-size: drop one of the two"
            )
    source = open_source(args.load_dir)
    if (source.format == "hf") != (args.loader == "crystalcoder_hf"):
        other = "crystalcoder_hf" if source.format == "hf" else "megatron"
        raise InputError(f"{args.load_dir}: is a {source.format} checkpoint: use --loader {other}")
    convert(
        args.load_dir,
        args.save_dir,
        format="hf" if args.saver == "crystalcoder_hf" else args.save_format or "torch",
        tensor_parallel=args.target_tensor_parallel_size,
        pipeline_parallel=args.target_pipeline_parallel_size,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        hf_config=resolve_hf_config_path(args.hf_config_path) if args.hf_config_path else None,
        overwrite=args.overwrite,
        verify=not args.no_checking,
        true_vocab_size=vocab_size,
        tokenizer=args.tokenizer_model,
        fused_norms=args.saver_transformer_impl == "transformer_engine",
        virtual_pipeline=args.target_virtual_pipeline_parallel_size,
        vocab_divisor=args.make_vocab_size_divisible_by or 1,
        release=bool(args.release),
        workers=args.workers,
        max_queue_size=args.max_queue_size,
    )


if __name__ == "__main__":
    main()
