"""Free places on this machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
