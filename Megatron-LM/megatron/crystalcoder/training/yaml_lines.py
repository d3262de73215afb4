"""A YAML file as plain values that remember the line each key stands on, so that an error can point there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import InputError

Key = str | int
KeyPath = tuple[Key, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML's YAML 1.1 reads 1e-9 (no point) as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass
class YamlFile:
    """The values of a YAML file, and where they came from: (key path) -> "file:line" or the override's text."""

    path: Path
    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, keys: KeyPath) -> str:
        """Where `keys` stands, or the innermost section around it that is there."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return f"{self.path}:1"

    def override(self, assignment: str) -> None:
        """Apply one `key.path=value`; the value is read as YAML, list items are named by number.

        Intermediate sections must exist; whether the last key is a valid one is for the schema to say.
        """
        name, equals, text = assignment.partition("=")
        keys: list[Key] = [int(part) if part.isdigit() else part for part in name.split(".")]
        if not equals or "" in keys:
            raise InputError(f"'{assignment}': write an override as key.path=value, like runconfig.max_steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise InputError(f"'{assignment}': '{text}' is not a YAML value: quote it") from None
        target: Any = self.values
        for depth, key in enumerate(keys[:-1]):
            target = _child(target, key, assignment, keys[:depth])
        if isinstance(target, list):
            _child(target, keys[-1], assignment, keys[:-1])
        elif not isinstance(target, dict):
            raise InputError(f"'{assignment}': {'.'.join(map(str, keys[:-1]))} is one value, not a section with keys")
        target[keys[-1]] = value
        self.places[tuple(keys)] = f"override '{assignment}'"


def _child(target: Any, key: Key, assignment: str, above: list[Key]) -> Any:
    where = ".".join(map(str, above)) or "the file"
    if isinstance(target, dict) and key in target:
        return target[key]
    if isinstance(target, list):
        if isinstance(key, int) and key < len(target):
            return target[key]
        raise InputError(
            f"'{assignment}': {where} is a list of {len(target)}: name an item from 0 to {len(target) - 1}"
        )
    raise InputError(f"'{assignment}': {where} has no section '{key}': check the name")


def read_yaml(path: Path) -> YamlFile:
    """Read a file whose top is a mapping. InputError: no such file, not YAML (with the line), a key given twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): give the path of a params.yaml") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text: give the path of a params.yaml") from None
    try:
        node = yaml.compose(text, _Loader)
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML ({error.problem}): correct the line") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error}): correct it") from None
    if not isinstance(values, dict) or node is None:
        raise InputError(f"{path}: holds no sections: a params.yaml has model, optimizer, train_input and runconfig")
    file = YamlFile(path, values)
    _note_places(file, node, ())
    return file


def _note_places(file: YamlFile, node: yaml.Node, above: KeyPath) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            keys = (*above, key_node.value)
            place = f"{file.path}:{key_node.start_mark.line + 1}"
            if keys in file.places:
                raise InputError(f"{place}: {'.'.join(map(str, keys))} is given twice: remove one of the two")
            file.places[keys] = place
            _note_places(file, value_node, keys)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            file.places[(*above, number)] = f"{file.path}:{item.start_mark.line + 1}"
            _note_places(file, item, (*above, number))
