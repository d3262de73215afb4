"""Conversations longer than a row: cut at a turn, split, or left out, and counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from finetune.chat_format import Conversation, Turn, encode
from finetune.conversation import PlainText
from finetune.fitting import fit

SYSTEM = Turn("system", "S")


def dialogue(*sizes: int) -> Conversation:
    """One exchange per size, its answer that many words long."""
    turns = [SYSTEM]
    for number, size in enumerate(sizes):
        turns += [Turn("user", f"u{number}"), Turn("assistant", "x " * size + f"a{number}")]
    return Conversation(tuple(turns))


@pytest.fixture
def fitted(tokenizer):
    def run(example, limit: int, policy):
        counts: Counter[str] = Counter()

        def encode_one(example):
            return next(encode((example,), tokenizer))

        documents = list(fit(example, encode_one(example), encode_one, limit, policy, counts))
        assert policy == "cut" or all(len(document.ids) <= limit for document in documents)
        return [tokenizer.decode(document.ids) for document in documents], dict(counts), documents

    return run


def parts(*exchanges: int, sizes: tuple[int, ...]) -> str:
    text = "<s><|sys_start|> S<|sys_end|>"
    for number in exchanges:
        text += f"<|im_start|> u{number}<|im_end|> " + "x " * sizes[number] + f"a{number}"
    return text + "</s>"


def test_what_fits_is_left_alone(fitted) -> None:
    for policy in ("cut", "truncate", "split", "drop"):
        texts, counts, _ = fitted(dialogue(1, 1), 500, policy)
        assert (texts, counts) == ([parts(0, 1, sizes=(1, 1))], {})


def test_each_policy(fitted, tokenizer) -> None:
    """Planted: the limit of truncation one token lower -> one exchange less is kept, fails."""
    sizes = (10, 10, 10, 10, 10)
    conversation = dialogue(*sizes)
    two = len(next(encode((dialogue(10, 10),), tokenizer)).ids)
    assert len(fitted(conversation, two, "cut")[2][0].ids) > two
    texts, counts, _ = fitted(conversation, two, "truncate")
    assert (texts, counts) == ([parts(0, 1, sizes=sizes)], {"truncated": 1})
    texts, counts, _ = fitted(conversation, two, "split")
    expected = [parts(0, 1, sizes=sizes), parts(2, 3, sizes=sizes), parts(4, sizes=sizes)]
    assert (texts, counts) == (expected, {"split": 1})
    assert fitted(conversation, two, "drop")[:2] == ([], {"dropped": 1})


def test_an_exchange_that_alone_is_too_long_is_left_out(fitted) -> None:
    sizes = (2, 100, 2)
    assert fitted(dialogue(*sizes), 60, "truncate")[:2] == ([parts(0, sizes=sizes)], {"truncated": 1})
    texts, counts, _ = fitted(dialogue(*sizes), 60, "split")
    assert texts == [parts(0, sizes=sizes), parts(2, sizes=sizes)]
    assert counts == {"split": 1, "dropped_exchanges": 1}
    for policy in ("truncate", "split"):
        texts, counts, _ = fitted(dialogue(100), 60, policy)
        assert texts == []
        assert counts["dropped"] == 1


def test_a_plain_text_is_split_with_every_token_a_label_once(fitted, tokenizer) -> None:
    text = PlainText("y " * 100)
    whole = next(encode((text,), tokenizer))
    _, counts, pieces = fitted(text, 32, "truncate")
    assert counts == {"split": 1}
    np.testing.assert_array_equal(np.concatenate([p.ids[1:] for p in pieces]), whole.ids[1:])
    assert all(p.trained.all() for p in pieces)
