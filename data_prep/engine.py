"""Run a step's tasks, so that it can be killed at any moment and started again: here, on local processes.

A step (tokenise, FIM, shuffle, …) is a list of independent tasks; each writes its own files under their final names
only when they are complete, and then a record `OUT/.tasks/<name>.json` with what it counted. A relaunch skips the tasks
that have a record and does the others from their start, so the output is the same bytes as without the interruption.
After the last task the records become `OUT/manifest.json` (see manifest.py) and `.tasks` goes away.

What a task writes depends on the task alone, so the number of processes changes nothing but the time. Nor does a
cluster: inside `run_on` tasks go to Slurm or Ray (cluster.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import InputError, full_disk
from data_prep.manifest import MANIFEST, TASKS, Record, fingerprint_of, finished_manifest, write_manifest
from data_prep.streams import is_url

JOBS = "jobs.json"  # in TASKS: the cluster's jobs that are at work
FAILED = "failed.json"  # in TASKS: the first task that failed on a cluster, and why


class Task(NamedTuple):
    """One independent piece of a step: a name that is unique in it and safe as a file name, and what `work` needs."""

    name: str
    argument: Any


Work = Callable[[Any], Record]


class Stage(NamedTuple):
    """Tasks that do not depend on each other, and the importable function that does one."""

    tasks: Sequence[Task]
    work: Work


class Cluster(NamedTuple):
    """Where tasks go instead of local processes, "slurm" or "ray", and what it must be told (partition, address, …)."""

    kind: str
    options: dict[str, str]


class LostTasks(InputError):
    """A cluster's jobs ended without doing all tasks; their logs are kept."""


_cluster: ContextVar[Cluster | None] = ContextVar("cluster", default=None)


@contextmanager
def run_on(kind: str, options: Sequence[str] = ()) -> Iterator[None]:
    """Steps started in this context run on `kind`: "local", "slurm" or "ray"; options are "name=value".

    Raises:
        InputError: an option that is not name=value, or options for local processes.
    """
    pairs = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"--engine-option {option}: is not name=value")
        pairs[name.replace("-", "_")] = value
    if kind == "local":
        if pairs:
            raise InputError("--engine-option: belongs to --engine slurm or ray")
        yield
        return
    before = _cluster.set(Cluster(kind, pairs))
    try:
        yield
    finally:
        _cluster.reset(before)


def run_step(
    step: str,
    out: Path,
    tasks: Sequence[Task],
    work: Work,
    *,
    settings: dict[str, Any],
    before: Stage | None = None,
    processes: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Do `work(task.argument)` for each task and write the manifest; return it.

    Args:
        work: importable function; it returns what it counted (a `Record`).
        before: what must be done before the first of `tasks`; its files go to `out / TASKS` and vanish at the end.
        settings: all that decides the output, JSON-able: options, inputs with sizes, tokenizer. A finished folder with
            the same settings is left as it is; a half-done one is completed.
        overwrite: delete what `out` holds from other settings.
        progress: show a bar where stderr is a terminal.

    Raises:
        InputError: `out` holds something else; whatever `work` raises.
    """
    if processes < 1:
        raise InputError(f"--processes {processes}: at least 1 is needed")
    _spare_inputs(out, [entry["path"] for entry in settings.get("inputs", ())])
    # Without bad records "skip" does what "stop" does: a run that stopped at one may go on with "skip".
    fingerprint = fingerprint_of(step, {name: value for name, value in settings.items() if name != "on_error"})
    skips = settings.get("on_error") == "skip"
    manifest = finished_manifest(out)
    is_done = (
        manifest
        and manifest["fingerprint"] == fingerprint
        and manifest["settings"].get("inputs") == settings.get("inputs")
        and (skips or not manifest["counts"]["rejected"])
    )
    if manifest and is_done and not overwrite:
        print(f"{out}: already done with these settings (--overwrite does it again)", file=sys.stderr)
        shutil.rmtree(out / TASKS, ignore_errors=True)  # left by a run that was killed when all was done
        return manifest
    _claim(out, fingerprint, skips=skips, overwrite=overwrite)
    folder = out / TASKS
    if (folder / JOBS).exists():
        from data_prep.cluster import wait_for_earlier

        wait_for_earlier(folder)
    stages = [*([before] if before else []), Stage(tasks, work)]
    everything = [task for stage in stages for task in stage.tasks]
    for task in everything:
        (folder / task.name).parent.mkdir(parents=True, exist_ok=True)
    waiting = [Stage([t for t in s.tasks if not (folder / f"{t.name}.json").exists()], s.work) for s in stages]
    num_done = len(everything) - sum(len(stage.tasks) for stage in waiting)
    if num_done:
        print(f"{out}: {num_done} of {len(everything)} tasks are done, going on", file=sys.stderr)
    try:
        with _bar(step, len(everything) - num_done, shown=progress) as advance:
            for number in _run(folder, [stage for stage in waiting if stage.tasks], processes):
                num_done += number
                advance(number)
    except LostTasks:
        raise
    except BrokenProcessPool:
        remedy = "run the same command again, with fewer --processes if memory was short; what is done is kept"
        raise InputError(f"{out}: a worker process was killed: {remedy}") from None
    except (InputError, OSError, RuntimeError) as error:
        if not num_done:
            _leave(out)
        with tell_full_disk(out):
            raise error from None
    records = [json.loads((folder / f"{task.name}.json").read_bytes()) for task in everything]
    with tell_full_disk(out):
        manifest = write_manifest(step, out, fingerprint, settings, records)
    shutil.rmtree(folder)
    return manifest


@contextmanager
def tell_full_disk(out: Path) -> Iterator[None]:
    """Turn what a full disk raises into one line."""
    try:
        yield
    except (InputError, OSError, RuntimeError) as error:
        if reason := full_disk(error):
            remedy = "make room and run the same command again, what is done is kept"
            raise InputError(f"{out}: cannot be written ({reason}): {remedy}") from None
        raise


def _run(folder: Path, stages: Sequence[Stage], processes: int) -> Iterator[int]:
    """Do the tasks and see to their records in `folder`; yields how many more are done."""
    if cluster := _cluster.get():
        from data_prep.cluster import run_stages

        yield from run_stages(cluster, folder, stages, processes)
        return
    for stage in stages:
        for task, record in _results(stage.work, list(stage.tasks), processes):
            write_json(folder / f"{task.name}.json", record)
            yield 1


def _spare_inputs(out: Path, inputs: Sequence[str]) -> None:
    """Refuse an `out` that holds inputs, also behind links: --overwrite would delete them with it."""
    folder = out.resolve()
    for path in inputs:
        if not is_url(path) and Path(path).resolve().is_relative_to(folder):
            raise InputError(f"{out}: holds the input {path}: name another --out")


def refuse_out_among(inputs: Sequence[str | Path], out: Path) -> None:
    """Refuse an `out` below a folder all of whose files are inputs: a relaunch would take what it has written for one.

    Raises:
        InputError: it is there.
    """
    for given in inputs:
        if not is_url(str(given)) and out.resolve().is_relative_to(Path(given).resolve()):
            raise InputError(f"{out}: --out lies among the inputs: name another folder")


def check_output_name(option: str, name: str) -> None:
    """Refuse what would put a step's files elsewhere than into --out."""
    if not name or "/" in name:
        raise InputError(f"{option} {name!r}: what the files' names begin with, without a folder: --out names that")


def _claim(out: Path, fingerprint: str, *, skips: bool, overwrite: bool) -> None:
    """Make `out` ours: empty, or half-done by the same step with the same settings."""
    mark = out / TASKS / "settings.json"
    claim = {"fingerprint": fingerprint, "skips": skips}
    if mark.exists() and not overwrite:
        earlier = json.loads(mark.read_bytes())
        if earlier["fingerprint"] == fingerprint and (skips or not earlier["skips"]):
            write_json(mark, claim)
            return
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out}: is a file: --out names a folder")
        ours = mark.exists() or (out / MANIFEST).exists()
        begun = {TASKS, f"{mark.name}.partial"}  # all there is of a run that died before it had made `out` its own
        if any(path.name not in begun for path in out.rglob("*")):
            if not overwrite:
                what = "the output of other settings or inputs" if ours else "files already"
                raise InputError(f"{out}: holds {what}: name another --out, or --overwrite")
            if not ours and not any(out.rglob("*.h5")):
                # A slip in --out must not cost someone a folder.
                raise InputError(f"{out}: holds files that are no output of this command: name another --out")
            # Out of the way at once: records that outlive their files would be trusted by the next run.
            doomed = out.with_name(f".{out.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            out.rename(doomed)
            shutil.rmtree(doomed)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, claim)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}): choose another --out") from None


@contextmanager
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over the tasks with the time that is left; only for a person at a terminal."""
    if not (shown and total > 1 and sys.stderr.isatty()):
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Refreshed here and not by a thread of its own: see `_context`.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        bar = progress.add_task(title, total=total)
        progress.refresh()
        yield lambda number: progress.update(bar, advance=number, refresh=True)


def _leave(out: Path) -> None:
    """Give `out` up before anything was done in it, so that a corrected command may use it."""
    shutil.rmtree(out / TASKS)
    for folder in sorted((p for p in out.rglob("*") if p.is_dir()), reverse=True):
        with suppress(OSError):  # not empty
            folder.rmdir()
    with suppress(OSError):
        out.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)


def _results(work: Work, tasks: list[Task], processes: int) -> Iterator[tuple[Task, Record]]:
    """(task, its record) as they get done; the first error ends the rest."""
    if processes == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, work(task.argument)
        return
    with _one_thread_each(), _pool(min(processes, len(tasks)), _context()) as pool:
        waiting = list(reversed(tasks))
        running: dict[Future[Record], Task] = {}
        try:
            while True:
                # A short queue: what was not started is not done after an error.
                while waiting and len(running) < 2 * processes:
                    task = waiting.pop()
                    running[pool.submit(work, task.argument)] = task
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def stay_one_thread() -> None:
    """Called before numpy is loaded: it starts no threads for matrices, of which there are none here (`_context`)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _context() -> Any:
    """How workers are made: forked where this process is a single thread, else spawned.

    A forked worker has the modules and the tokenizer that are loaded here, which saves it half a second; of other
    threads it would have the locks as they are held at that moment, and wait for them for ever.
    """
    return multiprocessing.get_context("fork" if _is_alone() else "spawn")


def _is_alone() -> bool:
    """Whether this process is a single thread, as far as the system tells; those of an earlier stage's pool may take a
    moment to end after Python is done with them."""
    threads = Path("/proc/self/task")
    for _ in range(100):
        if not threads.is_dir() or threading.active_count() > 1:
            return False
        if len(list(threads.iterdir())) == 1:
            return True
        time.sleep(0.002)
    return False


def _pool(processes: int, context: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    """End this worker soon after its parent was killed: a relaunch must not meet it writing the same files; and at once
    at Ctrl-C, for a KeyboardInterrupt inside of a queue leaves its lock to nobody, and the pool waits for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Worker processes use one thread each: more threads than cores only wait for each other."""
    names = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
