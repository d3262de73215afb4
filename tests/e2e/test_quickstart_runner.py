"""Stages of the quickstart: run once, skipped if nothing changed, redone from the first change on, told on failure."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.errors import InputError
from tools.quickstart_report import plot_losses, stage_table
from tools.quickstart_runner import ROOT, Command, Done, Runner, Stage, StageFailed

WRITE = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); print('wrote', sys.argv[2])"


def writes(path: Path, text: str, **kwargs: object) -> Stage:
    """A stage whose command appends text to a file: run twice without clearing, the text is there twice."""
    return replace(Stage(path.stem, (Command(("python", "-c", WRITE, str(path), text)),), outputs=(path,)), **kwargs)  # type: ignore[arg-type]


def run_all(directory: Path, stages: list[Stage]) -> tuple[list[bool], str]:
    """Which stages were skipped, and what was printed."""
    output = io.StringIO()
    runner = Runner(directory, Console(file=output, width=200))
    done = [runner.run(stage, number, len(stages)) for number, stage in enumerate(stages, start=1)]
    return [d.skipped for d in done], output.getvalue()


@pytest.fixture
def chain(tmp_path: Path) -> list[Stage]:
    settings = tmp_path / "settings"
    settings.write_text("1")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    return [writes(first, "a"), writes(second, "b", inputs=(settings,)), writes(third, "c")]


def test_a_second_run_skips_everything(tmp_path: Path, chain: list[Stage]) -> None:
    skipped, printed = run_all(tmp_path / "run", chain)
    assert skipped == [False, False, False]
    assert "$ python -c" in printed
    assert "[1/3] first" in printed
    assert "wrote a" in (tmp_path / "run/logs/first.log").read_text()
    assert run_all(tmp_path / "run", chain)[0] == [True, True, True]


def test_a_changed_input_redoes_its_stage_and_those_after(tmp_path: Path, chain: list[Stage]) -> None:
    run_all(tmp_path / "run", chain)
    (tmp_path / "settings").write_text("2")
    assert run_all(tmp_path / "run", chain)[0] == [True, False, False]
    assert (tmp_path / "second").read_text() == "b"  # not "bb": the old output was removed first


def test_a_changed_command_redoes_its_stage_and_those_after(tmp_path: Path, chain: list[Stage]) -> None:
    run_all(tmp_path / "run", chain)
    assert run_all(tmp_path / "run", [writes(tmp_path / "first", "A"), *chain[1:]])[0] == [False, False, False]


def test_a_deleted_or_edited_output_is_made_again(tmp_path: Path, chain: list[Stage]) -> None:
    run_all(tmp_path / "run", chain)
    (tmp_path / "third").unlink()
    assert run_all(tmp_path / "run", chain)[0] == [True, True, False]
    (tmp_path / "second").write_text("edited")
    assert run_all(tmp_path / "run", chain)[0] == [True, False, False]
    assert (tmp_path / "second").read_text() == "b"


def test_a_failing_stage_shows_the_end_of_its_log_and_is_not_stamped(tmp_path: Path, chain: list[Stage]) -> None:
    broken = Stage("broken", (Command(("python", "-c", "print('why'); raise SystemExit(3)")),), outputs=())
    with pytest.raises(StageFailed, match=r"why\n\nbroken failed \(exit status 3\); the whole log: .*broken\.log"):
        run_all(tmp_path / "run", [chain[0], broken])
    with pytest.raises(StageFailed):
        run_all(tmp_path / "run", [chain[0], broken])
    forgetful = Stage("forgetful", (Command(("python", "-c", "")),), outputs=(tmp_path / "absent",))
    with pytest.raises(StageFailed, match=r"did not write .*absent"):
        run_all(tmp_path / "run", [forgetful])


def test_two_runs_in_one_directory_do_not_mix(tmp_path: Path) -> None:
    first = Runner(tmp_path, Console())
    with pytest.raises(InputError, match="another quickstart runs in it"):
        Runner(tmp_path, Console())
    del first
    Runner(tmp_path, Console())


def test_ending_the_run_ends_its_stage(tmp_path: Path) -> None:
    """Planted: no handler for SIGTERM in the command -> the stage's process lives on."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = (
        "import signal, sys; from pathlib import Path; from rich.console import Console\n"
        "from tools.quickstart_runner import Command, Runner, Stage, end_stage_on_sigterm\n"
        "end_stage_on_sigterm()\n"
        f"stage = Stage('sleep', (Command(('python', '-c', {code!r})),), outputs=())\n"
        f"Runner(Path({str(tmp_path)!r}), Console()).run(stage, 1, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pid = tmp_path / "pid"
    while process.poll() is None and not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_settings_stand_before_the_command(tmp_path: Path) -> None:
    code = "import os; print(os.environ['ITERS'])"
    command = Command(("python", "-c", code), {"ITERS": "10 or so"})
    run_all(tmp_path, [Stage("settings", (command,), outputs=())])
    log = (tmp_path / "logs/settings.log").read_text()
    assert log.splitlines()[0].startswith("$ ITERS='10 or so' python -c")
    assert log.splitlines()[1] == "10 or so"


def test_the_table_and_the_plot_read_the_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"lm_loss": 8.0 - i, "consumed_tokens": 1000 * (i + 1)} for i in range(3)]
    metrics.write_text("\n".join(map(json.dumps, records)))
    trained = Stage("phase 1", (), (), metrics=metrics, iterations=3)
    done = [Done(Stage("corpus", (), ()), 61.0, skipped=True), Done(trained, 5.2, skipped=False)]

    console = Console(file=io.StringIO(), record=True, width=120)
    console.print(stage_table(done))
    text = " ".join(console.export_text().split())
    assert "corpus │ 1:01 (before)" in text
    assert "phase 1 │ 0:05 │ 3,000 │ 8.000 │ 7.000" in text
    assert "total │ 1:06" in text

    plot_losses(done, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
