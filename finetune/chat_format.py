"""The chat format: an example -> segments -> token ids and which of them are trained. Defined once, for all commands.

CrystalChat's template, the default (others: templates.py):

    <s><|sys_start|>SYSTEM<|sys_end|><|im_start|>USER<|im_end|>ASSISTANT</s>
    <s><|sys_start|>SYSTEM<|sys_end|><|im_start|>U1<|im_end|>A1<|im_start|>U2<|im_end|>A2</s>

There is no space or newline around the control tokens. Each text is encoded on its own, so it starts with the
tokenizer's word-start mark and a control token spelled out inside it stays text. Without a system turn the two system
tokens are absent; the assistant may speak first.

A token is trained when the model has to produce it: every assistant token, and the `</s>` that ends the conversation.
The token after an earlier answer is the user's `<|im_start|>`, which nobody asks the model for: it is trained only with
`turn_ends`. A template that ends each answer with a token of its own has that token trained, and what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.tokenizer import Tokenizer
from finetune.conversation import DEFAULT_SYSTEM_PROMPT, Conversation, Example, PlainText, Role, Turn
from finetune.templates import (
    BOS,
    CRYSTALCHAT,
    EOS,
    SYSTEM_END,
    SYSTEM_START,
    USER_END,
    USER_START,
    ChatTemplate,
    is_control,
)

BATCH = 256  # examples whose texts are encoded together
MAX_SHAPES = 1_000  # of conversations, remembered
CONTROL_TOKENS = (BOS, EOS, USER_START, USER_END, SYSTEM_START, SYSTEM_END)

__all__ = [
    "BOS", "CONTROL_TOKENS", "DEFAULT_SYSTEM_PROMPT", "EOS", "SYSTEM_END", "SYSTEM_START", "USER_END", "USER_START",
    "ChatFormat", "Conversation", "Encoded", "Role", "Segment", "Turn", "control_token_ids", "encode", "segments",
]  # fmt: skip


class Segment(NamedTuple):
    """A stretch of the token stream: one control token, or a text to encode; and whether the model is trained on it."""

    content: str
    is_control: bool
    trained: bool


class Encoded(NamedTuple):
    """Token ids of one document, int32 (t,), and a bool (t,) that is set where the token itself is to be learnt.

    `packing` turns `trained` into the loss mask, which belongs to the position before, the one that predicts.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class ChatFormat:
    """A template and what of a conversation is trained.

    train: assistant (default; without the answers that the data gives weight 0), last (the last answer alone), all
    (every token). turn_ends: also the start of the user turn that follows a trained answer.
    """

    template: ChatTemplate = CRYSTALCHAT
    train: Literal["assistant", "last", "all"] = "assistant"
    turn_ends: bool = False

    def segments(self, example: Example) -> Iterator[Segment]:
        """The example as control tokens and texts, in order. Neighbouring texts stay apart only where one is trained
        and the other is not."""
        if isinstance(example, PlainText):
            # In the reference's rows of plain text the `<s>` behind another document's end is predicted too.
            return iter((Segment(BOS, True, True), Segment(example.text, False, True), Segment(EOS, True, True)))
        shape = tuple([(turn.role, turn.trained) for turn in example.turns])
        if shape not in self._steps_of:
            if len(self._steps_of) >= MAX_SHAPES:
                self._steps_of.clear()
            self._steps_of[shape] = list(_joined(self._steps(shape)))
        return self._spoken(self._steps_of[shape], example.turns)

    def prompt(self, turns: Sequence[Turn]) -> Iterator[Segment]:
        """The segments of an unfinished conversation, up to where the model's answer begins."""
        steps = chain(
            (_step(part, False) for part in self.template.start),
            _turn_steps(self.template, [(turn.role, False) for turn in turns]),
            (_step(part, False) for part in self.template.assistant.before),
        )
        return self._spoken(_joined(steps), turns)

    @cached_property
    def _steps_of(self) -> dict[Shape, list[_Step]]:
        """What has been found before: most conversations of a data set have one of a few shapes."""
        return {}

    def _steps(self, shape: Shape) -> Iterator[_Step]:
        everything = self.train == "all"
        last = len(shape) - 1
        trained = [
            everything or (role == "assistant" and wanted and (self.train != "last" or number == last))
            for number, (role, wanted) in enumerate(shape)
        ]
        told = [(role, is_trained) for (role, _), is_trained in zip(shape, trained, strict=True)]
        yield from (_step(part, everything) for part in self.template.start)
        yield from _turn_steps(self.template, told, turn_ends=self.turn_ends, everything=everything)
        written = self.template.written_ends[1]
        for number, part in enumerate(self.template.end):
            yield _step(part, everything or (number < written and trained[last]))

    def _spoken(self, steps: Iterable[_Step], turns: Sequence[Turn]) -> Iterator[Segment]:
        texts = [turn.text.strip() if self.template.strip else turn.text for turn in turns]
        for parts, is_control_token, trained in steps:
            content = "".join([texts[part] if isinstance(part, int) else part for part in parts])
            yield Segment(content, is_control_token, trained)


Shape = tuple[tuple[Role, bool], ...]  # of a conversation: who speaks, and whether the data wants it trained


class _Step(NamedTuple):
    """A segment whose texts are yet to be filled in: words of the template, and numbers of turns that speak there."""

    parts: tuple[str | int, ...]
    is_control: bool
    trained: bool


def _turn_steps(
    template: ChatTemplate, turns: Sequence[tuple[Role, bool]], *, turn_ends: bool = False, everything: bool = False
) -> Iterator[_Step]:
    """turns: who speaks, and whether that is trained."""
    previous: Role | None = None
    written = template.written_ends[0]
    for number, (role, is_trained) in enumerate(turns):
        markup = template.markup(role, previous)
        for place, part in enumerate(markup.before):
            follows_answer = place == 0 and previous == "assistant" and turns[number - 1][1]
            yield _step(part, everything or (turn_ends and follows_answer))
        before, after = markup.text.split("{text}")
        yield _Step((before, number, after), is_control=False, trained=is_trained)
        for place, part in enumerate(markup.after):
            # Only an answer is ever trained, so these are the assistant's.
            yield _step(part, everything or (is_trained and place < written))
        previous = role


def _step(part: str, trained: bool) -> _Step:
    return _Step((part,), is_control(part), trained)


def _joined(steps: Iterable[_Step]) -> Iterator[_Step]:
    held: _Step | None = None
    for step in steps:
        if held is not None:
            if not (held.is_control or step.is_control) and held.trained == step.trained:
                held = _Step(held.parts + step.parts, is_control=False, trained=held.trained)
                continue
            yield held
        held = step
    if held is not None:
        yield held


_CRYSTALCHAT_FORMAT = ChatFormat()


def segments(conversation: Conversation, chat_format: ChatFormat = _CRYSTALCHAT_FORMAT) -> Iterator[Segment]:
    """The conversation as control tokens and texts, in order."""
    return chat_format.segments(conversation)


def encode(
    examples: Iterable[Example], tokenizer: Tokenizer, chat_format: ChatFormat = _CRYSTALCHAT_FORMAT
) -> Iterator[Encoded]:
    """Token ids of each example, and which of them are trained.

    Raises:
        InputError: the tokenizer lacks a control token.
    """
    controls = _control_arrays(tokenizer, chat_format.template)
    remaining = iter(examples)
    while batch := list(islice(remaining, BATCH)):
        yield from _encode(map(chat_format.segments, batch), tokenizer, controls)


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Ids of an unfinished conversation, up to where the model's answer begins."""
    prompt = ChatFormat(template).prompt(turns)
    ids: list[int] = _encode([prompt], tokenizer, _control_arrays(tokenizer, template))[0].ids.tolist()
    return ids


def _encode(
    streams: Iterable[Iterable[Segment]], tokenizer: Tokenizer, controls: dict[str, NDArray[np.int32]]
) -> list[Encoded]:
    """The documents of several streams, whose texts are encoded together: short ones cost a third of the time so."""
    pieces: list[NDArray[np.int32] | None] = []  # None: the next of the texts
    trained: list[bool] = []
    texts: list[str] = []
    ends = []
    for stream in streams:
        inside = False
        for content, is_control_token, is_trained in stream:
            if is_control_token:
                pieces.append(controls[content])
            else:
                # Behind a control token a text starts with the word-start mark; behind other text it goes on.
                texts.append(content if inside or not content else " " + content)
                pieces.append(None)
            inside = not is_control_token
            trained.append(is_trained)
        ends.append(len(pieces))
    found = iter(tokenizer.encode_all(texts))
    arrays = [next(found) if piece is None else piece for piece in pieces]
    sizes = np.fromiter(map(len, arrays), np.int64, len(arrays))
    ids = np.concatenate([*arrays, np.empty(0, np.int32)])
    flags = np.repeat(np.array(trained, np.bool_), sizes)
    borders = np.append(0, np.cumsum(sizes))[[0, *ends]].tolist()
    return [Encoded(ids[begin:end], flags[begin:end]) for begin, end in pairwise(borders)]


def _control_arrays(tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, NDArray[np.int32]]:
    return {name: np.array([number], np.int32) for name, number in control_token_ids(tokenizer, template).items()}


def control_token_ids(tokenizer: Tokenizer, template: ChatTemplate = CRYSTALCHAT) -> dict[str, int]:
    """Ids of the template's control tokens (and of `<s>` and `</s>`), looked up by name.

    Raises:
        InputError: the tokenizer lacks one.
    """
    ids = {token: tokenizer.token_id(token) for token in dict.fromkeys((BOS, EOS, *template.control_tokens))}
    found = {token: i for token, i in ids.items() if i is not None}
    if missing := ids.keys() - found.keys():
        raise InputError(
            f"{tokenizer.path}: has no {', '.join(sorted(missing))}: "
            "use a tokenizer with the CrystalCoder special tokens added"
        )
    return found
