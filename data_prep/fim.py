"""Fill in the middle: a text's middle moved to its end, between marks, so that a causal model learns to infill.

    PSM   PRE prefix SUF suffix MID middle
    SPM   PRE SUF suffix MID prefix middle

(Bavarian et al. 2022, arXiv 2207.14255; marks and orders as StarCoder's.) BOS stays in front of PRE and EOS behind all.
The cuts fall between any two characters. Each part's ids are the tokenizer's for that part, with nothing put in front
of a suffix or a middle, so `undo` gives back the exact text. The `▁` that starts a document belongs to its first
character, in whichever part that is.

Two places: `fim_document` before packing, where nothing can be cut off, and `fim_row` on sequences that are packed
already. Chance is a pure function of (seed, epoch, file, row or document), never of who runs it when.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from data_prep.errors import InputError
from data_prep.packing import padded_row, stream_of
from data_prep.token_cuts import TokenCuts
from data_prep.tokenizer import FimIds, Tokenizer

Level = Literal["char", "token"]
Ids = list[np.ndarray]  # in stretches, one behind the other


@dataclass(frozen=True)
class FimSettings:
    """How often (`rate`), of these how often in the order SPM (`spm_rate`), from which seed, cut between what."""

    rate: float
    spm_rate: float = 0.5
    seed: int = 0
    level: Level = "char"

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("spm-rate", self.spm_rate)):
            if not 0 <= value <= 1:
                raise InputError(f"FIM {name} {value}: is a probability, from 0 to 1")
        if self.level not in ("char", "token"):
            raise InputError(f"FIM level {self.level!r}: is char or token")


class Draws(NamedTuple):
    """The four chances of one text, each uniform in [0, 1): whether, which order, and the two cuts."""

    whether: float
    order: float
    cut1: float
    cut2: float

    @classmethod
    def of(cls, *key: str | int) -> Draws:
        """The draws of a key: (seed, epoch, file, row, document)."""
        digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=32).digest()
        return cls(*(2.0**-53 * (number >> 11) for number in struct.unpack("<4Q", digest)))

    def cuts(self, length: int) -> tuple[int, int]:
        """Two positions 0 … length, the smaller first."""
        first, second = int(self.cut1 * (length + 1)), int(self.cut2 * (length + 1))
        return min(first, second), max(first, second)


def fim_document(text: str, tokenizer: Tokenizer, settings: FimSettings, draws: Draws) -> np.ndarray:
    """Ids of a whole document (without BOS and EOS), transformed if the draw says so; an empty text never is."""
    if not text or draws.whether >= settings.rate:
        return tokenizer.encode_array(text)
    if settings.level == "token":
        ids = tokenizer.encode_array(text)
        a, b = draws.cuts(len(ids))
        parts = [[ids[:a]], [ids[a:b]], [ids[b:]]]
    else:
        a, b = draws.cuts(len(text))
        texts = [text[:a], text[a:b], text[b:]]
        first = next(i for i, part in enumerate(texts) if part)
        texts[first] = " " + texts[first]
        parts = [[tokenizer.encode_inside(part)] for part in texts]
    return np.concatenate(arrange(*parts, fim=tokenizer.fim_ids, is_spm=draws.order < settings.spm_rate))


def arrange(prefix: Ids, middle: Ids, suffix: Ids, *, fim: FimIds, is_spm: bool) -> Ids:
    """The three parts with their marks in the order PSM or SPM."""
    pre, suf, mid = (np.array([mark], np.int32) for mark in (fim.prefix, fim.suffix, fim.middle))
    if is_spm:
        return [pre, suf, *suffix, mid, *prefix, *middle]
    return [pre, *prefix, suf, *suffix, mid, *middle]


def undo(ids: Sequence[int] | np.ndarray, fim: FimIds) -> list[int]:
    """The ids of a text (no BOS, no EOS) in the text's order; a text without marks is returned as it is.

    Raises:
        ValueError: marks missing, doubled or out of order.
    """
    ids = [int(token) for token in ids]
    marks = [i for i, token in enumerate(ids) if token in (fim.prefix, fim.middle, fim.suffix)]
    if not marks:
        return ids
    if [ids[i] for i in marks] != [fim.prefix, fim.suffix, fim.middle] or marks[0] != 0:
        raise ValueError("the marks are not PRE, SUF, MID")
    _, suffix_at, middle_at = marks
    prefix, suffix, middle = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    # In SPM prefix and middle follow each other after MID, and nothing stands between PRE and SUF.
    return prefix + middle + suffix


class RowFim:
    """FIM on packed sequences: every text between EOS is transformed by itself, BOS and EOS stay where they are.

    The tokens of a text are not decoded and encoded again; only those around a cut are (see token_cuts.py). A sequence
    cannot grow and the marks take room: what does not fit is taken off the end of the last text *before* that text is
    transformed, so no middle is ever cut short. Labels are always the token that follows; the loss mask is 0 on padding
    and nowhere else.
    """

    def __init__(self, tokenizer: Tokenizer, settings: FimSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.counts: Counter[str] = Counter()  # texts, texts transformed, padding, tokens that found no room
        self._cuts = TokenCuts(tokenizer)

    def __call__(self, row: np.ndarray, *key: str | int) -> np.ndarray:
        """Transform one sequence (3, L); `key` is (epoch, file, row number).

        Raises:
            InputError: ids that the tokenizer's texts do not have.
        """
        stream = stream_of(row)
        self._check(stream, key)
        length, eos = row.shape[1], self.tokenizer.eos_id
        is_full = bool(row[1, -1])
        room = length + 1  # the last token is a label only
        parts: Ids = []
        ends = [*(np.flatnonzero(stream == eos) + 1).tolist(), len(stream)]
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            text = stream[begin:end]
            ending = text[-1:] if len(text) and text[-1] == eos else text[:0]
            plain = text[: len(text) - len(ending)]
            self.counts["texts"] += len(plain) > 0
            draws = Draws.of(self.settings.seed, *key, number)
            num_fitting = 0
            if draws.whether < self.settings.rate and self._has_text(plain):
                if not len(ending) and is_full:
                    plain = plain[:-1]  # its last token is the first of the next sequence, where it is counted
                part, num_fitting = self._fit(plain, draws, room - len(ending))
            if not num_fitting:  # not chosen, or there is no room for any of it with its marks
                parts.append(text[:room])
                self.counts["tokens_dropped"] += len(text) - len(parts[-1])
                room -= len(parts[-1])
                continue
            self.counts["texts_transformed"] += 1
            self.counts["tokens_dropped"] += len(plain) - num_fitting
            parts += part
            if num_fitting < len(plain):
                self.counts["tokens_dropped"] += len(stream) - end
                break
            parts.append(ending)
            room -= sum(map(len, part)) + len(ending)
        result = np.concatenate(parts)
        self.counts["padding"] += length + 1 - len(result)
        return padded_row(result, length, self.tokenizer.fim_ids.pad)

    def _check(self, stream: np.ndarray, key: Sequence[str | int]) -> None:
        fim = self.tokenizer.fim_ids
        limit = min(self.tokenizer.vocab_size, fim.prefix, fim.middle, fim.suffix)
        if len(stream) and int(stream.max()) >= limit:
            bad = int(stream.max())
            if bad in (fim.prefix, fim.middle, fim.suffix, fim.pad):
                raise InputError(f"{key[1]}: row {key[2]}: has FIM marks already: FIM is done once")
            raise InputError(
                f"{key[1]}: row {key[2]}: id {bad} is no text of {self.tokenizer.path}: use the tokenizer that made it"
            )

    def _has_text(self, text: np.ndarray) -> bool:
        return len(text) > (1 if len(text) and text[0] == self.tokenizer.bos_id else 0)

    def _fit(self, text: np.ndarray, draws: Draws, room: int) -> tuple[Ids, int]:
        """The transform of as much of `text` as fits into `room` tokens, and how many of its tokens that is."""
        has_bos = int(len(text) > 0 and text[0] == self.tokenizer.bos_id)
        ends = self._cuts.ends(text[has_bos:])
        count = min(len(text), max(0, room - 3))
        while count > 0:
            part = [text[:has_bos], *self._transform(text[has_bos:count], ends[: count - has_bos], draws, has_bos)]
            size = sum(map(len, part))
            if size <= room:
                return part, count
            count -= size - room
        return [], 0

    def _transform(self, body: np.ndarray, ends: np.ndarray, draws: Draws, is_start: int) -> Ids:
        parts: tuple[Ids, Ids, Ids]
        if self.settings.level == "token":
            a, b = draws.cuts(len(body))
            parts = [body[:a]], [body[a:b]], [body[b:]]
        else:
            # The space that the tokenizer put in front of a document is no character of it: no cut behind it.
            dummy = int(is_start and self._cuts.starts_with_dummy(body))
            a, b = draws.cuts((int(ends[-1]) if len(body) else 0) - dummy)
            parts = self._cuts.cut_twice(body, ends, a + dummy if a else 0, b + dummy if b else 0)
        return arrange(*parts, fim=self.tokenizer.fim_ids, is_spm=draws.order < self.settings.spm_rate)
