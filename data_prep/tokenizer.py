"""Text to token ids, exactly: `decode(encode(text)) == text`, and no text ever becomes a control token.

Tokenizers of the LLaMA kind are read, from a `tokenizer.json` (BPE or Unigram) or a SentencePiece `.model`: spaces are
`▁`, one `▁` goes in front of a text, characters outside the vocabulary become byte pieces. Their control tokens (`<s>`,
`<|fim_prefix|>`, …) are taken out of the matcher, so `</s>` in a web page is four characters, not the end of a
document.

One character is beyond the format: U+2581 (`▁` itself) means a space to these tokenizers and decodes to one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from data_prep.errors import InputError
from data_prep.piece_cache import META, PieceCache, Seams, inner_pairs

# The tokens that code corpora add, in the order of their ids after the 32,000 of LLaMA's vocabulary (32000 … 32017).
CODE_TOKENS = (
    "fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "filename", "gh_stars", "issue_start", "issue_comment",
    "issue_closed", "jupyter_start", "jupyter_text", "jupyter_code", "jupyter_output", "empty_output",
    "commit_before", "commit_msg", "commit_after", "reponame",
)  # fmt: skip
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")
CONTROL = re.compile(r"<[^<>\s]+>\Z")


@dataclass(frozen=True)
class FimIds:
    """Ids of the fill-in-the-middle tokens."""

    prefix: int
    middle: int
    suffix: int
    pad: int


class Encoder(Protocol):
    """What turns texts into ids: no control tokens, nothing put in front."""

    def encode(self, text: str) -> list[int]: ...

    def encode_word(self, word: str) -> list[int]:
        """The same for a short text, by the quickest way."""
        ...


class Tokenizer:
    """A tokenizer of the LLaMA kind; make one with `load_tokenizer`.

    Attributes:
        pieces: the piece of each id (`pieces[i]` of id i), control tokens included.
        controls: name -> id of the control tokens, which text never produces.
        bos_id, eos_id: begin and end of a document.
    """

    def __init__(
        self, path: Path, pieces: list[str], controls: dict[str, int], encoder: Encoder, *, is_bpe: bool
    ) -> None:
        self.path = path
        self.pieces = pieces
        self.controls = controls
        self._encoder = encoder
        seams = Seams.of(self.inner_pairs) if is_bpe and len(self.byte_ids) == 256 else None
        self._cache = PieceCache(seams, encoder.encode_word) if seams else None
        self.bos_id = self._required("<s>")
        self.eos_id = self._required("</s>")

    def _required(self, name: str) -> int:
        if name not in self.controls:
            raise InputError(f"{self.path}: has no token {name}: a tokenizer of the LLaMA kind is needed")
        return self.controls[name]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, control tokens included."""
        return len(self.pieces)

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """Id of a byte piece -> its byte."""
        return {number: int(byte[1], 16) for number, p in enumerate(self.pieces) if (byte := BYTE_PIECE.match(p))}

    @cached_property
    def inner_pairs(self) -> set[tuple[str, str]]:
        """The pairs of characters that some piece holds side by side (see piece_cache.py)."""
        special = {*self.controls.values(), *self.byte_ids}
        return inner_pairs(piece for number, piece in enumerate(self.pieces) if number not in special)

    def token_id(self, name: str) -> int | None:
        """Id of the control token `name` ("<|im_start|>"), None if the tokenizer has none."""
        return self.controls.get(name)

    @cached_property
    def fim_ids(self) -> FimIds:
        """The fill-in-the-middle ids, by name; a vocabulary without them gets them after its last id, as LLaMA does.

        Raises:
            InputError: it has some of them only.
        """
        names = CODE_TOKENS[:4]
        spelled = [[self.controls.get(f"<|{name}|>"), self.controls.get(f"<{name}>")] for name in names]
        found = [next((number for number in numbers if number is not None), None) for numbers in spelled]
        if all(number is None for number in found):
            return FimIds(*range(self.vocab_size, self.vocab_size + 4))
        if missing := [name for name, number in zip(names, found, strict=True) if number is None]:
            raise InputError(f"{self.path}: has FIM tokens, but no {', '.join(missing)}: add them to its added_tokens")
        return FimIds(*(number for number in found if number is not None))

    @property
    def vocab_size_with_fim(self) -> int:
        """One more than the largest id that a sequence may hold: the fill-in-the-middle ids may lie behind the last."""
        fim = self.fim_ids
        return max(self.vocab_size, 1 + max(fim.prefix, fim.middle, fim.suffix, fim.pad))

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text: no begin, no end, no control tokens; "" gives []."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a read-only int32 array (n,)."""
        return self.encode_inside(" " + text) if text else np.empty(0, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_inside` of each text, faster than one after the other if they are short."""
        if self._cache:
            return self._cache.encode_all(texts)
        return [self.encode_inside(text) for text in texts]

    def encode_inside(self, text: str) -> np.ndarray:
        """Ids of a text that stands inside a document: nothing is put in front, so parts decode to just their text."""
        if self._cache:
            return self._cache.encode(text)
        return np.array(self.encode_uncached(text), np.int32)

    def encode_uncached(self, text: str) -> list[int]:
        """`encode_inside` by the tokenizer alone: what the cache's ids are equal to."""
        return self._encoder.encode(text)

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """What each id stands for, UTF-8; byte pieces one byte; control tokens their name."""
        controls = set(self.controls.values())
        table = []
        for number, piece in enumerate(self.pieces):
            if number in controls:
                table.append(piece.encode())
            elif number in self.byte_ids:
                table.append(bytes([self.byte_ids[number]]))
            else:
                table.append(piece.replace(META, " ").encode())
        return table

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The exact text of a whole text's ids: `decode(encode(text)) == text`. Control tokens appear by name."""
        return self.decode_inside(ids).removeprefix(" ")

    def decode_inside(self, ids: list[int] | np.ndarray) -> str:
        """The exact text of ids that stand inside a document; U+FFFD for characters that the ids cut apart."""
        table, size = self.piece_bytes, self.vocab_size
        return b"".join(table[i] if i < size else b"<%d>" % i for i in ids).decode(errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's file."""
        return hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.path,)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds `tokenizer.json` or `tokenizer.model`.

    Raises:
        InputError: nothing there, not a tokenizer, or not one of the LLaMA kind.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise InputError(f"{path}: holds no tokenizer.json or tokenizer.model")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file: name a tokenizer.json or a SentencePiece .model")
    try:
        if path.suffix == ".model":
            return _load_sentencepiece(path)
        return _load_json(path)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - both libraries raise bare Exceptions with their own words
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is not a tokenizer.json or a SentencePiece .model ({reason})") from None


def load_tokenizer_once(path: str) -> Tokenizer:
    """`load_tokenizer`, remembered: what a process's tasks share."""
    # By the full path: "tokenizer.json" is another file in another working directory.
    return _load_remembered(str(Path(path).resolve()))


@lru_cache(maxsize=4)
def _load_remembered(path: str) -> Tokenizer:
    return load_tokenizer(path)


class _JsonEncoder:
    def __init__(self, definition: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(orjson.dumps(definition).decode())
        self._model = self._backend.model

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text.replace(" ", META), add_special_tokens=False).ids
        return ids

    def encode_word(self, word: str) -> list[int]:
        # The model alone, without what surrounds it (offsets, added tokens): a third of the time.
        return [token.id for token in self._model.tokenize(word.replace(" ", META))]


def _load_json(path: Path) -> Tokenizer:
    definition = orjson.loads(path.read_bytes())
    if not (isinstance(definition, dict) and isinstance(definition.get("model"), dict)):
        raise InputError(f"{path}: is JSON, but no tokenizer.json: it has no `model`")
    model = definition["model"]
    _require_llama_kind(path, definition)
    if model["type"] == "BPE":
        vocab: dict[str, int] = dict(model["vocab"])
    else:
        vocab = {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    added = {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
    is_control = {t["content"]: t["special"] or CONTROL.match(t["content"]) for t in definition["added_tokens"]}
    controls = {name: number for name, number in added.items() if is_control[name]}
    pieces = [""] * (1 + max([*vocab.values(), *added.values()]))
    for piece, number in (vocab | added).items():
        pieces[number] = piece
    # Only the model is left, with what could spell a control token or a byte piece in text taken out of it.
    unspeakable = set(controls) | {piece for piece in vocab if BYTE_PIECE.match(piece)}
    if model["type"] == "BPE":
        joined = ((m, m.replace(" ", "") if isinstance(m, str) else "".join(m)) for m in model["merges"])
        model["merges"] = [merge for merge, piece in joined if piece not in unspeakable]
    else:
        # The best path must never use them: a piece that no normalised text contains.
        model["vocab"] = [[f" {piece}" if piece in controls else piece, score] for piece, score in model["vocab"]]
    plain = [t for t in definition.get("added_tokens") or () if t["content"] not in controls]
    bare = {"version": "1.0", "added_tokens": plain, "model": model}
    # With these, what becomes of a word depends on more than merges.
    odd = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    is_bpe = model["type"] == "BPE" and not plain and not any(model.get(name) for name in odd)
    return Tokenizer(path, pieces, controls, _JsonEncoder(bare), is_bpe=is_bpe)


def _require_llama_kind(path: Path, definition: dict[str, Any]) -> None:
    """Refuse what `_JsonEncoder` would not reproduce: other normalisers, pre-tokenisers and models."""
    steps = [definition.get("normalizer"), definition.get("pre_tokenizer")]
    flat = [s for step in steps if step for s in step.get("normalizers", step.get("pretokenizers", [step]))]
    kinds = {"Prepend", "Replace", "Metaspace"}
    replaces = [s for s in flat if s["type"] == "Replace"]
    is_prefixed = any(
        s["type"] == "Prepend"
        or (s["type"] == "Metaspace" and s.get("prepend_scheme", "always") in ("always", "first"))
        for s in flat
    )
    ours = (
        definition["model"]["type"] in ("BPE", "Unigram")
        and definition["model"].get("byte_fallback", False)
        and all(s["type"] in kinds for s in flat)
        and all(s["pattern"] == {"String": " "} and s["content"] == META for s in replaces)
        and is_prefixed
    )
    if not ours:
        kinds_seen = ", ".join([definition["model"]["type"], *(s["type"] for s in flat)])
        raise InputError(f"{path}: is not a tokenizer of the LLaMA kind (▁ for spaces, byte fallback): {kinds_seen}")


class _SentencePieceEncoder:
    def __init__(self, serialized: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    encode_word = encode


def _load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece.sentencepiece_model_pb2 as generated

    schema: Any = generated  # its classes are made at run time

    proto = schema.ModelProto()
    proto.ParseFromString(path.read_bytes())
    spec = proto.normalizer_spec
    if spec.name != "identity" or spec.remove_extra_whitespaces or not spec.add_dummy_prefix:
        raise InputError(
            f"{path}: changes the text it reads (normalisation {spec.name!r}, remove_extra_whitespaces "
            f"{spec.remove_extra_whitespaces}): train it with identity normalisation, all spaces kept, a dummy prefix"
        )
    spec.add_dummy_prefix = False  # `encode` puts it there itself, `encode_inside` must not
    piece_type = schema.ModelProto.SentencePiece
    controls = {}
    for number, piece in enumerate(proto.pieces):
        if piece.type == piece_type.USER_DEFINED and CONTROL.match(piece.piece):
            piece.type = piece_type.CONTROL  # else its name in a text would become the token
        if piece.type in (piece_type.CONTROL, piece_type.UNKNOWN):
            controls[piece.piece] = number
    pieces = [piece.piece for piece in proto.pieces]
    is_bpe = proto.trainer_spec.model_type == schema.TrainerSpec.BPE
    has_symbols = any(piece.type == piece_type.USER_DEFINED for piece in proto.pieces)  # matched before the merges
    encoder = _SentencePieceEncoder(proto.SerializeToString())
    return Tokenizer(path, pieces, controls, encoder, is_bpe=is_bpe and not has_symbols)
