"""Chat templates as data: what stands around each speaker's text. CrystalChat's is the default.

A template is a list of parts around each role's text. A part that is spelled like `<name>` is a control token of the
tokenizer, anything else is literal text. A user's own template is a YAML file of the same fields:

    start: []
    user: {before: ["<|im_start|>", "user\\n"], after: ["<|im_end|>", "\\n"]}
    assistant: {before: ["<|im_start|>", "assistant\\n"], after: ["<|im_end|>", "\\n"]}
    system: {before: ["<|im_start|>", "system\\n"], after: ["<|im_end|>", "\\n"]}
    end: []

`text` of a role ("{text}" by default) puts characters around the words that belong to them: the
assistant's are trained. `user_after_system` replaces `user` behind a system turn. `strip` trims every text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import InputError
from data_prep.tokenizer import CONTROL
from finetune.conversation import Role

BOS, EOS = "<s>", "</s>"
SYSTEM_START, SYSTEM_END = "<|sys_start|>", "<|sys_end|>"
USER_START, USER_END = "<|im_start|>", "<|im_end|>"
# The file beside a model or rows that says which template they were made with.
TEMPLATE_FILE = "chat_format.yaml"


@dataclass(frozen=True)
class Markup:
    """What stands before, around and after one role's text."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    text: str = "{text}"

    @property
    def parts(self) -> tuple[str, ...]:
        return self.before + self.after


@dataclass(frozen=True)
class ChatTemplate:
    """Parts at the start of a conversation, around each role's text, and at the end."""

    name: str
    system: Markup
    user: Markup
    assistant: Markup
    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    user_after_system: Markup | None = None
    strip: bool = False

    def __post_init__(self) -> None:
        for where in self._markups():
            if where.text.count("{text}") != 1:
                raise InputError(f"chat template {self.name}: 'text' is {where.text!r}: it must hold {{text}} once")
        openings = [self.assistant.before or user.after for user in (self.user, self.user_after_system) if user]
        if any(opening and opening[-1].endswith(" ") for opening in openings):
            raise InputError(
                f"chat template {self.name}: a space before the answer, which tokens of the answer begin with: "
                "leave it out there and give the assistant text: ' {text}'"
            )
        if self.answer_end is None:
            raise InputError(
                f"chat template {self.name}: no control token ends an answer, so a model could never stop: "
                "begin the assistant's 'after', or 'end', with one"
            )

    def markup(self, role: Role, previous: Role | None) -> Markup:
        """What stands around a turn of `role` that follows one of `previous`."""
        if role == "user" and previous == "system" and self.user_after_system is not None:
            return self.user_after_system
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens it needs of a tokenizer, each once."""
        parts = [*self.start, *(part for markup in self._markups() for part in markup.parts), *self.end]
        return tuple(dict.fromkeys(part for part in parts if is_control(part)))

    @property
    def answer_end(self) -> str | None:
        """The control token with which the model ends its last answer."""
        return next((part for part in (*self.assistant.after, *self.end) if is_control(part)), None)

    @cached_property
    def written_ends(self) -> tuple[int, int]:
        """How many parts of the assistant's `after`, and of `end`, the model writes itself: up to `answer_end`."""
        parts = (*self.assistant.after, *self.end)
        count = next((number for number, part in enumerate(parts, start=1) if is_control(part)), 0)
        after = min(count, len(self.assistant.after))
        return after, count - after

    @property
    def stops(self) -> tuple[str, ...]:
        """Control tokens at which an answer is over: its end, and what would begin the next user turn."""
        after_an_answer = next((part for part in self.user.before if is_control(part)), None)
        return tuple(dict.fromkeys(token for token in (self.answer_end, after_an_answer) if token))

    def _markups(self) -> Iterator[Markup]:
        yield from (self.system, self.user, self.assistant)
        if self.user_after_system is not None:
            yield self.user_after_system

    def to_yaml(self) -> str:
        """The file that `load_template` reads back as an equal template."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return list(value) if isinstance(value, tuple) else value

        return yaml.safe_dump(plain(asdict(self)), sort_keys=False, allow_unicode=True)


@cache
def is_control(part: str) -> bool:
    """Whether a part names a control token."""
    return CONTROL.match(part) is not None


CRYSTALCHAT = ChatTemplate(
    "crystalchat",
    start=(BOS,),
    system=Markup((SYSTEM_START,), (SYSTEM_END,)),
    user=Markup((USER_START,), (USER_END,)),
    assistant=Markup(),
    end=(EOS,),
)
CHATML = ChatTemplate(
    "chatml",
    start=(BOS,),
    system=Markup((USER_START, "system\n"), (USER_END, "\n")),
    user=Markup((USER_START, "user\n"), (USER_END, "\n")),
    assistant=Markup((USER_START, "assistant\n"), (USER_END, "\n")),
    end=(EOS,),
)
LLAMA2 = ChatTemplate(
    "llama2",
    system=Markup((BOS, "[INST] <<SYS>>\n"), ("\n<</SYS>>\n\n",)),
    user=Markup((BOS, "[INST] "), (" [/INST]",)),
    user_after_system=Markup((), (" [/INST]",)),
    assistant=Markup((), (EOS,), text=" {text} "),
    strip=True,
)
TEMPLATES = {template.name: template for template in (CRYSTALCHAT, CHATML, LLAMA2)}


def load_template(name: str) -> ChatTemplate:
    """A built-in template by its name, or the one in a YAML file.

    Raises:
        InputError: neither, or a file with other fields than a template's.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"chat template {name}: is none of {', '.join(TEMPLATES)} and no file: check the name")
    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())}): repair it") from None
    if not isinstance(given, dict):
        raise InputError(f"{path}: holds no chat template: it needs system, user and assistant")
    known = {field.name for field in fields(ChatTemplate)}
    if unknown := given.keys() - known:
        raise InputError(f"{path}: unknown field '{min(map(str, unknown))}': use {', '.join(sorted(known))}")
    if missing := {"system", "user", "assistant"} - given.keys():
        raise InputError(f"{path}: lacks '{min(missing)}': a chat template needs system, user and assistant")
    values: dict[str, Any] = {"name": path.stem}
    for key, value in given.items():
        if key in ("start", "end"):
            values[key] = _parts(value, f"{path}: '{key}'")
        elif key in ("system", "user", "assistant", "user_after_system"):
            values[key] = None if value is None else _markup(value, f"{path}: '{key}'")
        else:
            values[key] = value
    if not isinstance(values.get("strip", False), bool):
        raise InputError(f"{path}: 'strip' must be true or false")
    return ChatTemplate(**values)


def _markup(value: Any, place: str) -> Markup:
    if not isinstance(value, dict) or value.keys() - {"before", "after", "text"}:
        raise InputError(f"{place} must hold before, after and text, and nothing else")
    text = value.get("text", "{text}")
    if not isinstance(text, str):
        raise InputError(f"{place}: 'text' must be text")
    return Markup(_parts(value.get("before", []), f"{place}: 'before'"), _parts(value.get("after", []), place), text)


def _parts(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise InputError(f"{place} must be a list of control tokens and texts")
    return tuple(value)


def template_beside(folder: Path) -> ChatTemplate:
    """The template that a folder of rows or a model was made with; CrystalChat's where it says nothing."""
    file = folder / TEMPLATE_FILE
    return load_template(str(file)) if file.is_file() else CRYSTALCHAT
