"""The chat format of CrystalChat, defined once: conversation -> segments -> token ids and which of them are trained.

    <s><|sys_start|>SYSTEM<|sys_end|><|im_start|>USER<|im_end|>ASSISTANT</s>
    <s><|sys_start|>SYSTEM<|sys_end|><|im_start|>U1<|im_end|>A1<|im_start|>U2<|im_end|>A2</s>

There is no space or newline around the control tokens. Each text is encoded on its own, so it starts with the
tokenizer's word-start mark and a control token spelled out inside it stays text. Without a system turn the two system
tokens are absent; the assistant may speak first.

A token is trained when the model has to produce it: every assistant token, and the `</s>` that ends the conversation.
The token after an earlier answer is the user's `<|im_start|>`, which nobody asks the model for: it is not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
SYSTEM_START, SYSTEM_END = "<|sys_start|>", "<|sys_end|>"
USER_START, USER_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (BOS, EOS, USER_START, USER_END, SYSTEM_START, SYSTEM_END)

DEFAULT_SYSTEM_PROMPT = (
    "You are CrystalCoder, a helpful and intelligent assistant. "
    "Follow the instructions and answer the questions as accurately as possible."
)

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one speaker says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in an order the format can express: at most one system turn, first; then user and assistant alternate
    (the assistant may begin) and the assistant has the last word.

    Raises:
        InputError: the order is another; the message names the turn, the caller adds the file and line.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise InputError("the conversation has no turns: drop the record")
        previous: Role | None = None
        for number, turn in enumerate(self.turns):
            if turn.role not in get_args(Role):
                raise InputError(f"turn {number}: unknown role '{turn.role}': use system, user or assistant")
            if turn.role == "system" and number:
                raise InputError(f"turn {number}: a system turn after the first: move it to the front")
            if turn.role == previous:
                raise InputError(f"turn {number}: the {turn.role} speaks twice in a row: join the two turns")
            previous = turn.role
        if previous != "assistant":
            raise InputError(f"the last turn is the {previous}'s, not the assistant's: add the answer or drop the turn")

    def with_system(self, prompt: str) -> Conversation:
        """This conversation, opened with `prompt` unless it has a system turn of its own or the prompt is empty."""
        if not prompt or self.turns[0].role == "system":
            return self
        return Conversation((Turn("system", prompt), *self.turns))


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


def segments(conversation: Conversation) -> Iterator[Segment]:
    """The conversation as control tokens and texts, in order."""

    def control(token: str, trained: bool = False) -> Segment:
        return Segment(token, is_control=True, trained=trained)

    yield control(BOS)
    for turn in conversation.turns:
        text = Segment(turn.text, is_control=False, trained=turn.role == "assistant")
        match turn.role:
            case "system":
                yield from (control(SYSTEM_START), text, control(SYSTEM_END))
            case "user":
                yield from (control(USER_START), text, control(USER_END))
            case "assistant":
                yield text
    yield control(EOS, trained=True)


def encode(conversations: Iterable[Conversation], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Token ids of each conversation, and which of them are trained.

    Raises:
        InputError: the tokenizer lacks a control token.
    """
    control_ids = control_token_ids(tokenizer)
    for conversation in conversations:
        ids: list[int] = []
        trained: list[bool] = []
        for segment in segments(conversation):
            piece = [control_ids[segment.content]] if segment.is_control else tokenizer.encode(segment.content)
            ids += piece
            trained += [segment.trained] * len(piece)
        yield Encoded(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_))


def control_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the format's control tokens, looked up by name.

    Raises:
        InputError: the tokenizer lacks one.
    """
    ids = {token: tokenizer.token_id(token) for token in CONTROL_TOKENS}
    found = {token: i for token, i in ids.items() if i is not None}
    if missing := ids.keys() - found.keys():
        raise InputError(
            f"{tokenizer.path}: has no {', '.join(sorted(missing))}: "
            "use a tokenizer with the CrystalCoder special tokens added"
        )
    return found
