"""Conversations that are longer than a row: cut at a turn, split into several, or left out. Always counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from finetune.chat_format import Encoded
from finetune.conversation import Conversation, Example, PlainText, Turn

LongPolicy = Literal["cut", "truncate", "split", "drop"]


def fit(
    example: Example,
    encoded: Encoded,
    encode_one: Callable[[Example], Encoded],
    limit: int,
    policy: LongPolicy,
    counts: Counter[str],
) -> Iterator[Encoded]:
    """The example, whose document is `encoded`, in documents of at most `limit` tokens.

    policy: cut: as it is, whatever its length (rows cut it where they end). truncate: its first exchanges, as many as
    fit. split: all its exchanges, in several conversations that each open with the system turn. drop: nothing. A plain
    text is split, between any two tokens, unless it is cut. An exchange that alone is too long is left out.
    counts: gets "truncated", "split", "dropped" (conversations) and "dropped_exchanges".
    """
    if policy == "cut" or len(encoded.ids) <= limit:
        yield encoded
    elif isinstance(example, PlainText):
        counts["split"] += 1
        # Pieces overlap by one token: the last of one is the first input of the next, and every token is a label once.
        for start in range(0, len(encoded.ids) - 1, limit - 1):
            yield Encoded(encoded.ids[start : start + limit], encoded.trained[start : start + limit])
    elif policy == "drop":
        counts["dropped"] += 1
    else:
        yield from _in_pieces(example, encode_one, limit, policy == "split", counts)


def _in_pieces(
    conversation: Conversation,
    encode_one: Callable[[Example], Encoded],
    limit: int,
    goes_on: bool,
    counts: Counter[str],
) -> Iterator[Encoded]:
    exchanges = list(conversation.exchanges())
    found = begin = 0
    while begin < len(exchanges) and (goes_on or not found):
        end, piece = _longest(conversation, exchanges, begin, encode_one, limit)
        if piece is None:
            if not goes_on:
                break
            counts["dropped_exchanges"] += 1
            begin += 1
            continue
        found += 1
        begin = end
        yield piece
    counts["dropped" if not found else "split" if goes_on else "truncated"] += 1


def _longest(
    conversation: Conversation,
    exchanges: list[tuple[Turn, ...]],
    begin: int,
    encode_one: Callable[[Example], Encoded],
    limit: int,
) -> tuple[int, Encoded | None]:
    """The most exchanges from `begin` on that fit, by bisection: their end, and their document."""
    best: Encoded | None = None
    low, high = begin, len(exchanges)
    while low < high:
        middle = (low + high + 1) // 2
        turns = tuple(turn for exchange in exchanges[begin:middle] for turn in exchange)
        encoded = encode_one(Conversation((*conversation.system, *turns)))
        if len(encoded.ids) <= limit:
            low, best = middle, encoded
        else:
            high = middle - 1
    return low, best
