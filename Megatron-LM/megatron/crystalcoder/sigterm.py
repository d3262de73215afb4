"""SIGTERM is answered by a rank itself: it finishes its step and saves. Its helper processes must live as long.

A launcher sends SIGTERM to the whole process group of a rank: to those that read rows ahead for it, and to those that
write its checkpoints, too. Without them the rank could neither finish its step nor save.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def helpers_outlive_sigterm() -> Iterator[None]:
    """Processes that this thread starts inside never get SIGTERM; this process gets one that comes meanwhile later.

    The blocked signal is inherited: by the server that Python 3.14 forks helpers from, and by what that forks, too.
    """
    # Python's tracker of shared resources, if the first helper starts it, unblocks SIGTERM whatever was before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
