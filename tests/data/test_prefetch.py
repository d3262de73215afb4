"""A thread that reads ahead: the same stream, errors in their place, and an end.

Planted: errors swallowed by the thread, and a queue without a limit: each fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from data_prep.errors import InputError
from megatron.crystalcoder.data.prefetch import Batch, prefetched


def numbered(stop: int | None = None, taken: list[int] | None = None) -> Iterator[Batch]:
    for number in count():
        if number == stop:
            raise InputError(f"rows.jsonl:{number}: bad")
        if taken is not None:
            taken.append(number)
        yield {"tokens": torch.tensor([number])}


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_same_stream_and_no_thread_is_left() -> None:
    before = threads()
    stream = prefetched(numbered(), depth=3, pin=False)
    assert [int(batch["tokens"]) for batch in islice(stream, 50)] == list(range(50))
    assert threads() == before + 1
    del stream
    assert threads() == before
    assert [int(batch["tokens"]) for batch in prefetched(islice(numbered(), 4), depth=9, pin=False)] == [0, 1, 2, 3]


def test_an_error_comes_after_the_batches_before_it() -> None:
    stream = prefetched(numbered(stop=5), depth=2, pin=False)
    assert [int(batch["tokens"]) for batch in islice(stream, 5)] == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match=r"rows\.jsonl:5: bad"):
        next(stream)


def test_no_further_ahead_than_asked() -> None:
    taken: list[int] = []
    stream = prefetched(numbered(taken=taken), depth=4, pin=False)
    next(stream)
    deadline = time.monotonic() + 30
    while len(taken) < 6:  # one here, four in the queue, one in hand
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(taken) == 6


def test_what_it_reads_from_is_closed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever it ends, and whoever still refers to it (an error's traceback does): processes may read for it.

    Planted: left to whoever lets go of it last, fails.
    """
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: 1 / 0)
    for pin in (False, True):
        ended: list[bool] = []

        def batches(ended: list[bool] = ended) -> Iterator[Batch]:
            try:
                yield from numbered()
            finally:
                ended.append(True)

        source = batches()
        stream = prefetched(source, depth=2, pin=pin)
        if pin:
            with pytest.raises(ZeroDivisionError):
                next(stream)
        else:
            next(stream)
        stream.close()
        assert ended == [True]
        del source
