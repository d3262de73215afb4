"""Bad input, told in one line.

`InputError` is raised wherever the input (a file, a row, a flag) is wrong; its message names the file, the place,
what is wrong and what to do. Every command runs inside `exit_on_bad_input`, which prints that line and exits with 2.
It lives in the lowest room because every room raises it.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

EXIT_BAD_INPUT = 2


class InputError(ValueError):
    """The user's input is wrong; the message is one line that says where, what, and the remedy."""


def full_disk(error: BaseException) -> str | None:
    """What the system says if `error` means that a file cannot grow any further, None if it means something else."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if getattr(error, "errno", None) == number or f"errno = {number}," in str(error):  # HDF5 has it in its words
            return os.strerror(number)
    return None


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit code 2, without a traceback.

    In a distributed job every rank usually meets the same bad input: rank 0 speaks; the others give it the time to,
    then speak too if they are still alive (then the fault is theirs alone).
    """
    try:
        yield
    except InputError as error:
        if int(os.environ.get("RANK", "0")) != 0:
            time.sleep(3)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # os._exit would lose buffered output; SystemExit lets atexit handlers remove half-written files.
        raise SystemExit(EXIT_BAD_INPUT) from None


def exits_on_bad_input(command: Callable[P, R]) -> Callable[P, R]:
    """`exit_on_bad_input` as a decorator for the function behind a command."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with exit_on_bad_input():
            return command(*args, **kwargs)

    return run
