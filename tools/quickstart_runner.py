"""Run the quickstart, stage by stage: show the commands, keep the logs, stamp what is done so that it is not redone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from data_prep.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 15  # of a failed stage's log
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Command:
    """One command as a user types it in the checkout: words, and the settings before them (`ITERS=10 bash ...`)."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.words)])

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        """Start it from the checkout with this interpreter's Python, its output appended to `log`."""
        program = {"crystalcoder": [sys.executable, "-m", "tools.cli"], "python": [sys.executable]}
        words = [*program.get(self.words[0], [self.words[0]]), *self.words[1:]]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = os.environ | {"PATH": path, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"} | self.environment
        with log.open("ab") as output:
            output.write(f"$ {self}\n".encode())
            output.flush()
            # A session of its own, so that a stage that is interrupted takes its workers with it.
            return subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )


@dataclass(frozen=True)
class Stage:
    """One step of the chain.

    inputs: files outside the run directory that it reads; a change of their content makes it run again.
    outputs: files and directories that it leaves; removed before it runs, so that a half-done attempt leaves no trace.
    metrics: for a training stage, the metrics.jsonl it writes and the iterations it runs (for the progress bar).
    """

    name: str
    commands: tuple[Command, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    metrics: Path | None = None
    iterations: int | None = None
    sequences: Path | None = None  # the sequence files it leaves: what the report counts tokens in

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.lower().replace(" ", "-").replace("/", "-")


@dataclass(frozen=True)
class Done:
    """A stage that is complete: how long it took when it ran, and whether that was in an earlier run."""

    stage: Stage
    seconds: float
    skipped: bool


def end_stage_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, on whose way out the running stage's processes are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class StageFailed(Exception):
    """A stage's command ended with an error; the message holds the end of its log."""


class Runner:
    """Runs stages in order below one directory; stamps and logs lie in `stamps/` and `logs/` there."""

    def __init__(self, directory: Path, console: Console) -> None:
        """Take hold of the directory. Raises InputError when another run has it."""
        self.directory = directory
        self.console = console
        self._fingerprint = _digest([version("crystalcoder"), platform.python_version(), sys.prefix])
        for name in ("stamps", "logs"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "stamps" / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
        except OSError:
            raise InputError(
                f"{directory}: another quickstart runs in it: wait for it, or choose another --dir"
            ) from None

    def log(self, stage: Stage) -> Path:
        """Where a stage's output is kept."""
        return self.directory / "logs" / f"{stage.slug}.log"

    def run(self, stage: Stage, number: int, total: int) -> Done:
        """Run a stage, or skip it when its stamp says that it was done with the same inputs and left its outputs.

        Stages are chained: a stage's fingerprint holds those before it and the files they left, so whatever is redone
        redoes all that follows.

        Raises:
            StageFailed: a command's exit status was not 0.
        """
        commands = [str(command) for command in stage.commands]
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in stage.inputs]
        self._fingerprint = _digest([self._fingerprint, stage.name, commands, contents])
        stamp = self.directory / "stamps" / f"{stage.slug}.json"
        title = f"[{number}/{total}] {stage.name}"
        seconds = self._done_before(stamp, stage)
        if seconds is not None:
            self._chain(stage)
            self.console.print(f"[green]✓[/] {title} [dim]done before ({seconds:.0f} s): skipped[/]", highlight=False)
            return Done(stage, seconds, skipped=True)

        stamp.unlink(missing_ok=True)
        for output in stage.outputs:
            _remove(output)
        self.log(stage).unlink(missing_ok=True)
        started = time.monotonic()
        with self._progress() as progress:
            task = progress.add_task(title, total=stage.iterations, detail="")
            for command in stage.commands:
                progress.console.print(f"  [cyan]$ {_escape(str(command))}[/]", highlight=False, soft_wrap=True)
                self._run_command(command, stage, progress, task)
        seconds = time.monotonic() - started
        missing = [output for output in stage.outputs if not output.exists()]
        if missing:
            raise StageFailed(f"{stage.name}: ended well but did not write {', '.join(map(str, missing))}")
        record = {"fingerprint": self._fingerprint, "seconds": seconds, "outputs": _listing(stage.outputs)}
        partial = stamp.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        os.replace(partial, stamp)
        self._chain(stage)
        self.console.print(f"[green]✓[/] {title} [dim]{seconds:.0f} s[/]", highlight=False)
        return Done(stage, seconds, skipped=False)

    def _chain(self, stage: Stage) -> None:
        self._fingerprint = _digest([self._fingerprint, _listing(stage.outputs)])

    def _done_before(self, stamp: Path, stage: Stage) -> float | None:
        try:
            record = json.loads(stamp.read_text())
        except (FileNotFoundError, ValueError):
            return None
        if record["fingerprint"] != self._fingerprint or record["outputs"] != _listing(stage.outputs):
            return None
        return float(record["seconds"])

    def _progress(self) -> Progress:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}[/]"),
        )
        # Where nothing can be redrawn (a log file), the commands and the ticks say enough.
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def _run_command(self, command: Command, stage: Stage, progress: Progress, task: TaskID) -> None:
        log = self.log(stage)
        process = command.start(log)
        try:
            while True:
                try:
                    status = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    progress.update(task, detail=_escape(_last_line(log)), completed=_count_lines(stage.metrics))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise StageFailed(f"{tail}\n\n{stage.name} failed (exit status {status}); the whole log: {log}")


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _listing(outputs: Iterable[Path]) -> list[list[object]]:
    """Every file of the outputs with its size and time of change: cheap, and any edit or deletion alters it."""
    files = sorted(
        f for output in outputs for f in ([output] if output.is_file() else output.rglob("*")) if f.is_file()
    )
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def _count_lines(path: Path | None) -> int | None:
    if path is None or not path.exists():
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _escape(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", r"\[")
