"""docs/data.md: it has every option, and its first example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from data_prep import commands


def test_every_option_is_there(repo_root: Path) -> None:
    """Planted: an option that nobody describes -> named, fails."""
    text = (repo_root / "docs/data.md").read_text()
    group: Any = typer.main.get_command(commands.app)
    for name, command in group.commands.items():
        assert f"`data {name} " in text
        options = [
            flag for parameter in command.params if parameter.param_type_name == "option" for flag in parameter.opts
        ]
        assert [flag for flag in options if flag != "--help" and not re.search(rf"{flag}\b", text)] == []


def test_help_shows_what_is_in_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes `[word …]` for markup. Planted: no backslash before them -> "OUT//", fails."""
    monkeypatch.setenv("COLUMNS", "200")
    for command, words in (
        ("partition", "OUT/[train|valid]/[<value of the key>]/"),
        ("tokenize", "[text; parquet: also"),
    ):
        with suppress(SystemExit):
            commands.main([command, "--help"])
        assert words in capsys.readouterr().out


def test_the_first_run(repo_root: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    text = (repo_root / "docs/data.md").read_text()
    example = text.split("### A first run")[1].split("```bash\n")[1].split("```")[0]
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    command = tmp_path / "bin/crystalcoder"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tools.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        ["bash", "-e", "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "mixed: nothing wrong" in done.stdout
    assert "text/a.jsonl document " in done.stdout
    assert "documents 2" in done.stdout
