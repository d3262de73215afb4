"""What a training example is before it is encoded: a conversation of turns, or a plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from data_prep.errors import InputError

DEFAULT_SYSTEM_PROMPT = (
    "You are CrystalCoder, a helpful and intelligent assistant. "
    "Follow the instructions and answer the questions as accurately as possible."
)

Role = Literal["system", "user", "assistant"]
_ROLES = frozenset(get_args(Role))


class TurnError(InputError):
    """What is wrong with one turn of a conversation, and with which (from 0)."""

    def __init__(self, turn: int, reason: str) -> None:
        super().__init__(f"turn {turn}: {reason}")
        self.turn, self.reason = turn, reason


@dataclass(frozen=True)
class Turn:
    """What one speaker says. `trained` is False for an answer that the data gives weight 0: context, no example."""

    role: Role
    text: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in an order that a chat template can express: at most one system turn, first; then user and assistant
    alternate (the assistant may begin) and the assistant has the last word.

    Raises:
        TurnError: the order is another, or an unknown role; the caller adds the file and line.
        InputError: there are no turns.
    """

    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise InputError("the conversation has no turns: drop the record")
        previous: Role | None = None
        for number, turn in enumerate(self.turns):
            if turn.role not in _ROLES:
                raise TurnError(number, f"unknown role '{turn.role}': use system, user or assistant")
            if turn.role == "system" and number:
                raise TurnError(number, "a system turn after the first: move it to the front")
            if turn.role == previous:
                raise TurnError(number, f"the {turn.role} speaks twice in a row: join the two turns")
            previous = turn.role
        if previous != "assistant":
            reason = f"the last turn is the {previous}'s, not the assistant's: add the answer or drop the turn"
            raise TurnError(len(self.turns) - 1, reason)

    def with_system(self, prompt: str) -> Conversation:
        """This conversation, opened with `prompt` unless it has a system turn of its own or the prompt is empty."""
        if not prompt or self.turns[0].role == "system":
            return self
        return Conversation((Turn("system", prompt), *self.turns))

    @property
    def system(self) -> tuple[Turn, ...]:
        """The system turn, if there is one."""
        return self.turns[:1] if self.turns[0].role == "system" else ()

    def exchanges(self) -> Iterator[tuple[Turn, ...]]:
        """The turns after the system's in pieces that end with an answer each: where a conversation may be cut."""
        piece: tuple[Turn, ...] = ()
        for turn in self.turns[len(self.system) :]:
            piece = (*piece, turn)
            if turn.role == "assistant":
                yield piece
                piece = ()


@dataclass(frozen=True)
class PlainText:
    """A text without speakers, mixed in to keep what pretraining taught: every token of it is trained."""

    text: str


Example = Conversation | PlainText
