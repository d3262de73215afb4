"""How a training process ends, told by its exit code: 0 done, 2 bad input (data_prep.errors), and these."""

from __future__ import annotations

import signal

EXIT_DIVERGED = 3
# A SIGTERM was answered with a checkpoint; the shells' convention for a program that a signal ended.
EXIT_INTERRUPTED = 128 + signal.SIGTERM
