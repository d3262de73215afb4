"""Bad input, told in one line.

`InputError` is raised wherever the input (a file, a row, a flag) is wrong; its message names the file, the place,
what is wrong and what to do. Every command runs inside `exit_on_bad_input`, which prints that line and exits with 2.
It also ends a command quietly whose output nobody reads any longer (`… | head`).
It lives in the lowest room because every room raises it.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # what a shell sees of `cat` in `cat file | head`: 128 + SIGPIPE
STDOUT = 1


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
    """Turn an `InputError`, and a file that may not be touched, into one line on stderr and exit code 2, and a closed
    stdout into the exit code of SIGPIPE, all without a traceback.

    In a distributed job every rank usually meets the same bad input: rank 0 speaks; the others give it the time to,
    then speak too if they are still alive (then the fault is theirs alone).
    """
    # rich puts /dev/null in the place of a closed stdout and exits with 1, as click does: this still knows.
    stdout = _copy_of(STDOUT)
    try:
        try:
            yield
        except SystemExit:  # argparse and typer end so
            _flush()
            raise
        _flush()
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 1:
            raise
        if stdout is None or not _is_read_by_nobody(stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # what is still buffered has somewhere to go
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except (InputError, OSError) as error:
        told = str(error) if isinstance(error, InputError) else _forbidden(error)
        if told is None:
            raise
        if int(os.environ.get("RANK", "0")) != 0:
            time.sleep(3)
        print(f"error: {' '.join(told.split())}", file=sys.stderr, flush=True)
        # os._exit would lose buffered output; SystemExit lets atexit handlers remove half-written files.
        raise SystemExit(EXIT_BAD_INPUT) from None
    finally:
        if stdout is not None:
            os.close(stdout)


def _forbidden(error: OSError) -> str | None:
    """What a user can do about a file or folder that the system does not let us touch; None for anything else."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not error.filename:
        return None
    return f"{error.filename}: {os.strerror(error.errno)}: see to its permissions, or name another place"


def _copy_of(descriptor: int) -> int | None:
    try:
        return os.dup(descriptor)
    except OSError:  # closed
        return None


def _flush() -> None:
    """Write what is buffered here: when Python ends, a closed stdout would be a message and exit code 120."""
    if sys.stdout and not sys.stdout.closed:
        sys.stdout.flush()


def _is_read_by_nobody(descriptor: int) -> bool:
    """Whether it is a pipe, or a connection, whose other end is closed."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def exits_on_bad_input(command: Callable[P, R]) -> Callable[P, R]:
    """`exit_on_bad_input` as a decorator for the function behind a command."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with exit_on_bad_input():
            return command(*args, **kwargs)

    return run
