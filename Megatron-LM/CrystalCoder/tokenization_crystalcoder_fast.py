"""CrystalCoder's tokenizer for transformers. Needs nothing of this project: it also runs as remote code.

A LLaMA tokenizer (byte-fallback BPE; every text starts with the word-start mark U+2581, also after a special token)
with 22 special tokens behind its vocabulary: ids 32000-32021 after LLaMA's 32,000. Nothing is added around a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerFast

# In the order of their ids.
SPECIAL_TOKENS = (
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|filename|>",
    "<|gh_stars|>",
    "<|issue_start|>",
    "<|issue_comment|>",
    "<|issue_closed|>",
    "<|jupyter_start|>",
    "<|jupyter_text|>",
    "<|jupyter_code|>",
    "<|jupyter_output|>",
    "<|empty_output|>",
    "<|commit_before|>",
    "<|commit_msg|>",
    "<|commit_after|>",
    "<|reponame|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|sys_start|>",
    "<|sys_end|>",
)
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
WORD_START = "\u2581"  # stands for a space, and in front of every text

# A rendered conversation is one string, in which a control token that a speaker spells out would be read as the real
# one. So the template breaks such a spelling with a zero-width space; `encode_chat` needs no such change.
CHAT_TEMPLATE = (
    "{%- macro text(message) -%}"
    "{%- if message['content'] is not string -%}{{- raise_exception('content must be a string') -}}{%- endif -%}"
    "{%- set spoken = namespace(text=message['content']) -%}"
    "{%- for token in [" + ", ".join(f"'{token}'" for token in (UNK, BOS, EOS, *SPECIAL_TOKENS)) + "] -%}"
    "{%- set spoken.text = spoken.text | replace(token, '<\u200b' ~ token[1:]) -%}"
    "{%- endfor -%}"
    "{{- spoken.text -}}"
    "{%- endmacro -%}"
    "{{- '<s>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and loop.first -%}"
    "{{- '<|sys_start|>' ~ text(message) ~ '<|sys_end|>' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|im_start|>' ~ text(message) ~ '<|im_end|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- text(message) -}}"
    "{%- if loop.last -%}{{- '</s>' -}}{%- endif -%}"
    "{%- elif message['role'] == 'system' -%}"
    "{{- raise_exception('a system message must be the first') -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user or assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


class CrystalCoderTokenizerFast(PreTrainedTokenizerFast):
    """Reads `tokenizer.json` as it is. Has CrystalCoder's chat template where the directory brings none."""

    # No __init__ here: transformers would then rebuild the tokenizer from its vocabulary instead of reading the file,
    # and lose the normaliser that puts the word-start mark after special tokens.

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - the kind of attribute transformers reads
    _chat_template: str | dict[str, str] | None = None

    @property
    def chat_template(self) -> str | dict[str, str]:
        """The jinja template that `apply_chat_template` renders."""
        return self._chat_template or CHAT_TEMPLATE

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self._chat_template = template

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` alone: special tokens spelled out in it are text, nothing is added around it."""
        return list(self(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation, exactly as the model was trained on it, whatever the texts contain.

        messages: {"role": "system" | "user" | "assistant", "content": str}; a system message only as the first. After
        a user message the model's answer follows; after an assistant message at the end, the conversation is closed.
        The format is `chat_template`'s.

        Where no text spells out a control token, the ids are those of `apply_chat_template(messages)`. Where one does,
        here it stays text; there the template alters it, because in a rendered string it could not be told apart.

        Raises ValueError where the template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        controls = sorted((token for token in self.get_added_vocab() if token[0] == "<"), key=len, reverse=True)
        said = "".join(message["content"] for message in messages)
        # Stands for the `<` of a spelled-out control token until the real ones are found.
        mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in said)
        marked = []
        for message in messages:
            text = message["content"]
            for token in controls:
                text = text.replace(token, mark + token[1:])
            marked.append({**message, "content": text})
        awaits_answer = bool(messages) and messages[-1]["role"] == "user"
        try:
            rendered = self.apply_chat_template(marked, tokenize=False, add_generation_prompt=awaits_answer)
        except TemplateError as error:
            raise ValueError(str(error)) from None
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, controls)) + ")", str(rendered)):
            ids += self._ids(piece) if piece in controls else self.encode_text(piece.replace(mark, "<"))
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text that stands inside a document: `encode_text` without the word-start mark in front."""
        return [token.id for token in self.backend_tokenizer.model.tokenize(text.replace(" ", WORD_START))]

    def encode_infill(self, prefix: str, suffix: str, *, published: bool = False) -> list[int]:
        """Ids that ask for the text between `prefix` and `suffix`; the model's answer ends with </s>.

        published: False for models that this project's data preparation trained,
                <s> PREFIX prefix SUFFIX suffix MIDDLE       with a word-start mark before the prefix only;
            True for the published weights, which saw each part encoded as a text of its own,
                PREFIX prefix SUFFIX suffix MIDDLE           with a word-start mark before each part, the answer too.
        """
        start = [] if published else self._ids(BOS)
        after = self.encode_text(suffix) if published else self.encode_inside(suffix)
        fim_prefix, fim_suffix, fim_middle = self._ids("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
        return [*start, fim_prefix, *self.encode_text(prefix), fim_suffix, *after, fim_middle]

    def _ids(self, *tokens: str) -> list[int]:
        ids = self.convert_tokens_to_ids(list(tokens))
        return ids if isinstance(ids, list) else [ids]


__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "CrystalCoderTokenizerFast"]
