"""A chat template as Jinja, the form in which servers and `apply_chat_template` take it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from finetune.templates import ChatTemplate, Markup


def jinja_template(template: ChatTemplate, controls: Iterable[str]) -> str:
    """The template as a `chat_template.jinja`: the same ids as `encode`'s, for texts that spell no control token.

    A rendered conversation is one string, in which a control token that a speaker spells out would be read as the real
    one: the template breaks such a spelling with a zero-width space. controls: all that the tokenizer has, so also
    those that this template does not use.
    """
    strip = " | trim" if template.strip else ""
    lines = [
        "{%- macro text(message) -%}",
        "{%- if message['content'] is not string -%}{{- raise_exception('content must be a string') -}}{%- endif -%}",
        f"{{%- set spoken = namespace(text=message['content']{strip}) -%}}",
        f"{{%- for token in [{', '.join(map(_quoted, controls))}] -%}}",
        "{%- set spoken.text = spoken.text | replace(token, token[0] ~ '\u200b' ~ token[1:]) -%}",
        "{%- endfor -%}",
        "{{- spoken.text -}}",
        "{%- endmacro -%}",
        *_said(template.start),
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' and loop.first -%}",
        *_turn(template.system),
    ]
    if template.user_after_system is not None:
        lines += [
            "{%- elif message['role'] == 'user' and loop.previtem is defined and loop.previtem['role'] == 'system' -%}",
            *_turn(template.user_after_system),
        ]
    lines += [
        "{%- elif message['role'] == 'user' -%}",
        *_turn(template.user),
        "{%- elif message['role'] == 'assistant' -%}",
        *_turn(template.assistant),
        "{%- if loop.last -%}",
        *_said(template.end),
        "{%- endif -%}",
        "{%- elif message['role'] == 'system' -%}",
        "{{- raise_exception('a system message must be the first') -}}",
        "{%- else -%}",
        "{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        *_said(template.assistant.before),
        "{%- endif -%}",
    ]
    return "".join(lines)


def _turn(markup: Markup) -> list[str]:
    left, _, right = markup.text.partition("{text}")
    return [*_said((*markup.before, left)), "{{- text(message) -}}", *_said((right, *markup.after))]


def _said(parts: Iterable[str]) -> list[str]:
    whole = "".join(parts)
    return [f"{{{{- {_quoted(whole)} -}}}}"] if whole else []


def _quoted(text: str) -> str:
    """A Jinja string literal; its escapes are Python's, of which JSON's are a part."""
    return json.dumps(text, ensure_ascii=False)
