"""torchrun whose last words are the program's own.

    python -m megatron.crystalcoder.training.launch [torchrun's options] SCRIPT [its arguments]

torchrun answers any worker's exit with a report of its own and exit code 1. Here a worker that found bad input (exit
code 2, one line on stderr) ends the job with exit code 2 and that line alone, however many workers found it; any other
failure ends it with the worker's exit code, after the worker's own traceback and one line that names the rank; with
`--max-restarts N` the job first goes on from its last checkpoint, as often as that (elastic.py).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A worker that gets SIGTERM finishes its step and saves: give it more than torchrun's 30 seconds.
_SECONDS_TO_SAVE = "120"


def main(arguments: list[str] | None = None) -> None:
    """Run torchrun with these arguments and exit as the job did."""
    # Set before torchrun looks, so that it does not warn of choosing for us.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api as launcher

    from megatron.crystalcoder.training.elastic import Agent, JobIsOver

    vars(launcher)["LocalElasticAgent"] = Agent
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    options = run.parse_args(["--shutdown-timeout", _SECONDS_TO_SAVE, *(arguments or sys.argv[1:])])
    try:
        with _each_error_once():
            run.run(options)
    except ChildFailedError as error:
        raise SystemExit(_exit_code(error)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except JobIsOver:
        print("error: another node ended the job; what it said stands in its log", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except DistError as error:
        reason = str(error).strip().partition("\n")[0][:200]
        print(f"error: node 0 cannot be reached ({reason})", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


@contextmanager
def _each_error_once() -> Iterator[None]:
    """Pass on what this process and its workers write to stderr, an `error: ` line only the first time it comes.

    Every rank meets the same bad input; whether the others are stopped before they say so too is a matter of luck.
    """
    stderr = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)

    def pass_on() -> None:
        said = set()
        with open(read_end, "rb") as lines:
            for line in lines:
                if line not in said:
                    os.write(stderr, line)
                if line.startswith(b"error: "):
                    said.add(line)

    # A daemon: a worker that outlives the job must not keep the launcher waiting for the end of its stderr.
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        thread.join(timeout=10)


def _exit_code(error: object) -> int:
    from megatron.crystalcoder.training.elastic import FINAL, how_it_ended

    failures = getattr(error, "failures", {})
    for code in FINAL[:2]:  # these have said what is wrong
        if any(failure.exitcode == code for failure in failures.values()):
            return code
    print(f"error: {how_it_ended(failures)}; what it said stands above", file=sys.stderr, flush=True)
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    main()
