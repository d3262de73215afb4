"""Build a CrystalCoder tokenizer from a LLaMA `tokenizer.json` or a SentencePiece `.model`.

    python -m CrystalCoder.build_tokenizer SOURCE OUTPUT_DIR

Writes `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and the tokenizer's code into OUTPUT_DIR. The
source's pieces keep their ids; the 22 special tokens follow them (ids 32000-32021 after LLaMA's 32,000 pieces). A
source that has them there already is accepted, so building twice changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.errors import InputError, exits_on_bad_input

from . import tokenization_crystalcoder_fast as code
from .tokenization_crystalcoder_fast import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, UNK, WORD_START

LLAMA_LINE_SEPARATOR = 31353  # id of the piece U+2028 in LLaMA's vocabulary
# Spaces become word-start marks, and each stretch of text between special tokens gets one in front.
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": WORD_START},
        {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START},
    ],
}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
# Nothing is added around a text: the pretraining and the chat format place <s> and </s> themselves.
POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def build_tokenizer(source: Path, output_dir: Path) -> int:
    """Write the CrystalCoder tokenizer made from `source` into `output_dir`; return how many ids it has.

    source: a LLaMA-kind `tokenizer.json` (byte-fallback BPE), or a SentencePiece BPE `.model` trained with byte
        fallback and without normalisation (as LLaMA's was); or a directory that holds one of the two.

    Raises:
        InputError: there is no such file, or it is not a tokenizer of this kind. Nothing is written then.
    """
    source, output_dir = _find(Path(source)), Path(output_dir)
    model = _read_sentencepiece(source) if source.suffix == ".model" else _read_tokenizer_json(source)
    ids = {token: model["vocab"].get(token) for token in (UNK, BOS, EOS)}
    if None in ids.values():
        raise InputError(f"{source}: has no {', '.join(t for t, i in ids.items() if i is None)}: not LLaMA's kind")
    ids |= {token: len(model["vocab"]) + number for number, token in enumerate(SPECIAL_TOKENS)}
    if clash := [token for token in SPECIAL_TOKENS if token in model["vocab"]]:
        raise InputError(f"{source}: its vocabulary already holds {clash[0]}: train it without CrystalCoder's tokens")

    added = [{"id": number, "content": token, **_TOKEN_FLAGS} for token, number in ids.items()]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": POST_PROCESSOR,
        "decoder": DECODER,
        "model": model,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    _write(output_dir / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=2))
    _write(output_dir / "tokenizer_config.json", json.dumps(tokenizer_config(ids), indent=2))
    _write(output_dir / "chat_template.jinja", CHAT_TEMPLATE)
    _write(output_dir / Path(code.__file__).name, Path(code.__file__).read_text("utf-8"))
    return len(model["vocab"]) + len(SPECIAL_TOKENS)


def tokenizer_config(ids: Mapping[str, int]) -> dict[str, Any]:
    """What tokenizer_config.json holds beside a tokenizer.json whose special tokens have these ids."""
    return {
        "added_tokens_decoder": {str(number): {"content": t, **_TOKEN_FLAGS} for t, number in ids.items()},
        "additional_special_tokens": [token for token in ids if token not in (UNK, BOS, EOS)],
        "auto_map": {"AutoTokenizer": [None, "tokenization_crystalcoder_fast.CrystalCoderTokenizerFast"]},
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": int(1e30),
        "pad_token": None,
        "padding_side": "right",
        "tokenizer_class": "CrystalCoderTokenizerFast",
        "unk_token": UNK,
    }


_TOKEN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _find(source: Path) -> Path:
    if source.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (source / name).is_file():
                return source / name
        raise InputError(f"{source}: holds no tokenizer.json or tokenizer.model")
    if not source.is_file():
        raise InputError(f"{source}: no such tokenizer: name a LLaMA tokenizer.json or a SentencePiece .model")
    return source


def _read_tokenizer_json(source: Path) -> dict[str, Any]:
    """The BPE model of a `tokenizer.json`, its added tokens checked."""
    try:
        content = json.loads(source.read_text("utf-8"))
        model = content["model"]
        kind, fallback, vocab, merges = (model[key] for key in ("type", "byte_fallback", "vocab", "merges"))
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source}: is not a tokenizer.json ({type(error).__name__}: {error})") from None
    if kind != "BPE" or not fallback:
        raise InputError(f"{source}: is not a byte-fallback BPE tokenizer as LLaMA's: use LLaMA's tokenizer.json")
    expected = {**vocab, **{token: len(vocab) + number for number, token in enumerate(SPECIAL_TOKENS)}}
    for token, number in added.items():
        if expected.get(token) != number:
            raise InputError(
                f"{source}: has an added token {token!r} (id {number}) that CrystalCoder has not: remove it"
            )
    if vocab.get("") == LLAMA_LINE_SEPARATOR:
        # Some copies of LLaMA's tokenizer.json have lost this invisible piece's spelling.
        vocab = {"\u2028" if number == LLAMA_LINE_SEPARATOR else piece: number for piece, number in vocab.items()}
    return _bpe_model(vocab, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges])


def _read_sentencepiece(source: Path) -> dict[str, Any]:
    """The BPE model of a SentencePiece file: merges are every split of a piece into two pieces, best score first.

    SentencePiece joins the leftmost of equally good pairs; BPE with merges the same, except where one piece can be made
    from two different pairs that overlap. LLaMA's published tokenizer.json was made from its .model in this way too.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]  # the protobuf module makes its classes when imported
    try:
        proto.ParseFromString(source.read_bytes())
    except DecodeError as error:
        raise InputError(f"{source}: is not a SentencePiece model ({error})") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise InputError(f"{source}: is not a SentencePiece model (it has no pieces)")
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise InputError(
            f"{source}: is not a byte-fallback BPE model: train it with model_type=bpe, byte_fallback=true"
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.add_dummy_prefix:
        raise InputError(
            f"{source}: changes the text it reads: train it with normalization_rule_name=identity, "
            "remove_extra_whitespaces=false, add_dummy_prefix=true"
        )
    kinds = {piece.type for piece in proto.pieces}
    if proto.SentencePiece.USER_DEFINED in kinds:
        raise InputError(f"{source}: has user-defined symbols, which merges cannot express: train it without them")

    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    # Merges lead only to ordinary pieces: no text may spell its way to a control token or a byte.
    normal = {p.piece: p.score for p in proto.pieces if p.type == proto.SentencePiece.NORMAL}
    merges: list[tuple[float, list[str]]] = []
    for piece, score in normal.items():
        splits = ([piece[:i], piece[i:]] for i in range(1, len(piece)))
        pairs = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
        merges += ((score, pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    merges.sort(key=lambda merge: -merge[0])
    return _bpe_model(vocab, [pair for _, pair in merges])


def _bpe_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNK,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


@exits_on_bad_input
def main(
    source: Annotated[Path, typer.Argument(help="a LLaMA tokenizer.json or a SentencePiece .model")],
    output_dir: Annotated[Path, typer.Argument(help="where the tokenizer's files go")],
) -> None:
    """Build a CrystalCoder tokenizer directory."""
    print(f"{output_dir}: {build_tokenizer(source, output_dir)} ids")


if __name__ == "__main__":
    typer.run(main)
