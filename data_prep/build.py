"""`crystalcoder data build RECIPE`: the steps of a phase, one after the other, from raw folders to those it trains on.

A recipe is a YAML file: a list of steps, each a `crystalcoder data` command with its input, output and options. Every
step skips what it has done, so launching a recipe again goes on where it stopped. All paths are relative to --root.

    values: {tokenizer: tokenizer.json}        # what {tokenizer} stands for below; --set tokenizer=… changes it
    steps:
    - run: tokenize                            # `crystalcoder data tokenize`
      for: {language: [css, python]}           # once for each; lists side by side, {language} below
      in: raw/{language}                       # a path or a list of them
      out: tokens/{language}
      options: {tokenizer: "{tokenizer}", fim-rate: 0.3}
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep import commands
from data_prep.errors import InputError
from data_prep.manifest import MANIFEST, TASKS
from data_prep.subset import parse_subset

RECIPES = Path(__file__).with_name("recipes")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
# What the plan's estimates rest on, measured on source code: bytes of text per byte of parquet, zstd or gzip, and bytes
# written per byte of text that is tokenised.
UNPACKED = 3.0
TOKENIZED = 0.45
# Bytes that one process takes in a second, of text (partition, tokenize) or as they are read: CPU seconds of one core
# with source code on the machine of docs/benchmarks.md, rounded down. A disk slower than all processes is not in it.
RATES = {"parquet2jsonl": 50e6, "partition": 120e6, "tokenize": 15e6, "fim": 10e6, "shuffle": 60e6, "subset": 60e6}
FIM_SLOWER = 1.5  # tokenising with FIM
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError; where it lives depends on typer's version

Scalar = bool | int | float | str


class StepEntry(BaseModel):
    """One step as the file has it."""

    model_config = ConfigDict(extra="forbid")
    run: Literal["parquet2jsonl", "partition", "tokenize", "fim", "shuffle", "split", "subset"]
    inputs: Annotated[str | list[str], Field(alias="in")]
    out: str | None = None
    options: dict[str, Scalar] = {}
    each: Annotated[dict[str, list[str]], Field(alias="for")] = {}


class RecipeFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")
    values: dict[str, Scalar] = {}
    steps: Annotated[list[StepEntry], Field(min_length=1)]


@dataclass(frozen=True)
class Step:
    """One command to run, placeholders filled."""

    place: str  # "recipe.yaml: steps[3] (tokenize)"
    command: str
    inputs: tuple[str, ...]
    out: str | None
    options: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The folders it writes."""
        if self.out is not None:
            return (self.out,)
        return tuple(f"{folder}_part{half}of2" for folder in self.inputs for half in range(2))

    @property
    def arguments(self) -> list[str]:
        """The command line behind `crystalcoder data`."""
        return [self.command, *self.inputs, *(["--out", self.out] if self.out else []), *self.options]

    def option(self, name: str) -> str | None:
        """What follows `name` on the command line."""
        return dict(zip(self.options, self.options[1:], strict=False)).get(name)

    @property
    def state(self) -> str:
        """done, begun or to do."""
        if self.out is None:
            return "done" if all(Path(folder).is_dir() for folder in self.outputs) else "to do"
        if (Path(self.out) / MANIFEST).exists():
            return "done"
        return "begun" if (Path(self.out) / TASKS).exists() else "to do"


def build(
    recipe: str,
    root: Path = Path(),
    *,
    processes: int = 1,
    values: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> None:
    """Run a recipe's steps, or print them with their sizes.

    Args:
        recipe: a file, or the name of a shipped one (`crystalcoder_phase1`).
        root: what the recipe's paths are relative to.
        values: change the recipe's `values`.

    Raises:
        InputError: a recipe that cannot be run, inputs that are not there, whatever a step raises.
    """
    steps = load_recipe(find_recipe(recipe), values or {})
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder")
    with chdir(root):
        if dry_run:
            print("\n".join(plan(steps, processes)))
            return
        absent = missing_inputs(steps)
        if absent:
            raise InputError(
                f"{recipe}: {', '.join(absent)}: not in {root} (`crystalcoder data download` fetches corpora, "
                "--root names another folder)"
            )
        for number, step in enumerate(steps, start=1):
            arguments = step.arguments
            if any(parameter.name == "processes" for parameter in _command(step.command).params):
                arguments += ["--processes", str(processes)]
            if nothing := [given for given in step.inputs if not Path(given).exists()]:
                raise InputError(
                    f"{step.place}: {nothing[0]}: no step before has written anything there: of a small corpus a small "
                    "share may be none (--set changes shares like `valid`)"
                )
            print(f"[{number}/{len(steps)}] crystalcoder data {shlex.join(arguments)}", flush=True)
            commands.main(arguments)


def find_recipe(given: str, folder: Path = RECIPES) -> Path:
    """The recipe's file: the path as given, else the one of this name in `folder`, where the kit keeps its own.

    Raises:
        InputError: neither is there.
    """
    path = Path(given)
    if path.is_file():
        return path.resolve()
    shipped = folder / f"{path.stem}.yaml"
    if path.parent in (Path(), Path("recipes")) and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise InputError(f"{given}: no such recipe: give a file, or one of {names}")


def load_recipe(path: Path, values: Mapping[str, str]) -> list[Step]:
    """The steps of a recipe, each checked against its command's options.

    Raises:
        InputError: the first thing wrong, with file and key.
    """
    try:
        recipe = RecipeFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: is not a YAML file ({error}): mend it") from None
    except ValidationError as error:
        raise _first_finding(path, error) from None
    if unknown := sorted(set(values) - set(recipe.values)):
        raise InputError(f"--set {unknown[0]}: {path.name} has no such value, but {', '.join(recipe.values) or 'none'}")
    known = {name: str(value) for name, value in {**recipe.values, **values}.items()}
    steps = []
    for number, entry in enumerate(recipe.steps):
        place = f"{path}: steps[{number}] ({entry.run})"
        for chosen in _turns(entry.each, place):
            step = _step(entry, known | chosen, place)
            _check_arguments(step)
            steps.append(step)
    return steps


def _first_finding(path: Path, error: ValidationError) -> InputError:
    """The first of pydantic's findings in one line; unknown keys first, for a typo also makes a key missing."""
    finding = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in finding["loc"]]
    place = "".join(parts).lstrip(".") or "the file"
    if finding["type"] == "extra_forbidden":
        keys = "run, in, out, options, for" if len(finding["loc"]) > 1 else "values, steps"
        return InputError(f"{path}: {place}: no such key: use {keys}")
    return InputError(f"{path}: {place}: {finding['msg']}: mend this key (docs/data.md shows a recipe)")


def _turns(each: Mapping[str, list[str]], place: str) -> list[dict[str, str]]:
    """What `for` stands for: one mapping per turn."""
    if not each:
        return [{}]
    if len({len(listed) for listed in each.values()}) > 1:
        raise InputError(f"{place}: for: the lists {', '.join(each)} differ in length: give them the same")
    return [dict(zip(each, turn, strict=True)) for turn in zip(*each.values(), strict=True)]


def _step(entry: StepEntry, values: Mapping[str, str], place: str) -> Step:
    def filled(text: str) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise InputError(f"{place}: {{{match[1]}}} has no value: add it to `values` or `for`")
            return values[match[1]]

        return PLACEHOLDER.sub(value, text)

    if (entry.out is None) != (entry.run == "split"):
        wrong = "add it" if entry.out is None else "split names its folders itself: remove it"
        raise InputError(f"{place}: out: {wrong}")
    options: list[str] = []
    for name, setting in entry.options.items():
        flag = "--" + name.replace("_", "-")
        if flag in ("--out", "--processes", "--overwrite", "--engine", "--engine-option"):
            raise InputError(f"{place}: options.{name}: is not for a recipe: give it on the command line, or as a key")
        if setting is not False:
            options += [flag] if setting is True else [flag, filled(str(setting))]
    inputs = [entry.inputs] if isinstance(entry.inputs, str) else entry.inputs
    return Step(place, entry.run, tuple(map(filled, inputs)), entry.out and filled(entry.out), tuple(options))


def _command(name: str) -> Any:
    group: Any = typer.main.get_command(commands.app)
    return group.commands[name]


def _check_arguments(step: Step) -> None:
    """Refuse options that the command would refuse, before the first step has run for a day."""
    try:
        _command(step.command).make_context(step.command, step.arguments[1:])
    except USAGE_ERROR as error:
        message: Any = error
        raise InputError(
            f"{step.place}: {message.format_message()}: see crystalcoder data {step.command} --help"
        ) from None


def missing_inputs(steps: Sequence[Step]) -> list[str]:
    """Paths that are not there and that no earlier step makes."""
    made: list[Path] = []
    missing = []
    for step in steps:
        for given in step.inputs:
            if not Path(given).exists() and not any(Path(given).is_relative_to(folder) for folder in made):
                missing.append(given)
        made += map(Path, step.outputs)
        tokenizer = step.option("--tokenizer")
        if tokenizer and not Path(tokenizer).exists():
            missing.append(tokenizer)
    return list(dict.fromkeys(missing))


def plan(steps: Sequence[Step], processes: int = 1) -> list[str]:
    """The steps with their state, the bytes that they read and write and the time that they take, a line each.

    Estimates have a ~.
    """
    absent = missing_inputs(steps)
    sizes = _Sizes(steps)
    lines = []
    to_write = seconds = 0.0
    for number, step in enumerate(steps, start=1):
        read, written, work = sizes.of(step)
        state = "no input" if any(given in absent for given in step.inputs) else step.state
        took = 0.0
        if state != "done":
            to_write += max(0.0, written - (_bytes_in(step.out) if step.out else 0))
            took = work / processes
            seconds += took
        exact = all(Path(given).exists() for given in step.inputs)
        shown = f"{'' if exact else '~'}{_readable(read)} -> {'' if state == 'done' else '~'}{_readable(written)}"
        time = f"~{_duration(took)}" if took else ""
        lines.append(f"{number:>3}  {state:<9}{shown:<26}{time:<9}crystalcoder data {shlex.join(step.arguments)}")
    free = shutil.disk_usage(".").free
    lines.append(f"to be written: ~{_readable(to_write)}; free here: {_readable(free)}")
    rates = ", ".join(f"{name} {rate / 1e6:.0f}" for name, rate in RATES.items())
    lines.append(
        f"time: ~{_duration(seconds)} with --processes {processes} (here are {os.cpu_count()} cores), if each takes so "
        f"many MB/s: {rates}, and the disk keeps up"
    )
    lines += [f"not there: {given}" for given in absent]
    return lines


class _Sizes:
    """Bytes of the steps' folders: counted where they exist, else estimated from the inputs on."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._inputs = {Path(given) for step in steps for given in step.inputs}
        self._estimates: dict[Path, float] = {}
        self._plain: set[Path] = set()  # folders of unpacked text

    def of(self, step: Step) -> tuple[float, float, float]:
        """The bytes that a step reads and writes, and its seconds on one process; call it in the steps' order."""
        read = sum(self._size(Path(given)) for given in step.inputs)
        if step.out is None:  # links
            return read, 0.0, 0.0
        out = Path(step.out)
        epochs, valid = max(1, int(step.option("--epochs") or 0)), float(step.option("--valid") or 0)
        plain = any(Path(given).is_relative_to(folder) for given in step.inputs for folder in self._plain)
        text = read * (1 if plain else UNPACKED)
        seconds = (text if step.command in ("partition", "tokenize") else read) * epochs / RATES[step.command]
        if float(step.option("--fim-rate") or 0):
            seconds *= FIM_SLOWER
        growth = 1.0
        if step.command == "parquet2jsonl":
            self._plain.add(out)
            growth = UNPACKED
        elif step.command == "tokenize":
            growth = TOKENIZED * text / read if read else 0.0
        elif step.command == "partition" and plain:
            growth = 1 / UNPACKED
        elif step.command == "subset":
            growth = sum(end - start for start, end in parse_subset(step.option("--ranges") or "0-1"))
        written = read * epochs * growth
        if step.state == "done":
            return read, _bytes_in(out), 0.0
        self._estimates |= {out: written, out / "valid": written * valid, out / "train": written * (1 - valid)}
        self._estimates |= {out / f"epoch_{epoch}": written / epochs for epoch in range(epochs)}
        return read, written, seconds

    def _size(self, path: Path) -> float:
        if path.exists():
            return _bytes_in(path)
        for folder in (path, *path.parents):
            if folder in self._estimates:
                # A folder within: each that some step reads is taken to be as large as the others.
                shares = len({p for p in self._inputs if p.is_relative_to(folder)} - {folder})
                return self._estimates[folder] / (1 if folder == path else max(1, shares))
        return 0.0


def _bytes_in(path: str | Path) -> int:
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _readable(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB")) if size >= u), (1e6, "MB"))
    return f"{size / unit:,.2f} {name}"


def _duration(seconds: float) -> str:
    unit, name = next(((u, n) for u, n in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * u), (1, "s"))
    return f"{seconds / unit:.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.1f} {name}"
