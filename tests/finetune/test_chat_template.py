"""The tokenizer's chat template and `encode_chat` give the builder's ids: what is trained is what is asked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import CONTROL_TOKENS, ChatFormat, Conversation, Turn, encode, encode_prompt
from finetune.jinja import jinja_template
from finetune.templates import CHATML, CRYSTALCHAT, LLAMA2, ChatTemplate

WORDS = [
    "def",
    "foo(x):",
    "\n    return",
    " ",
    "  ",
    "\n",
    "naïve",
    "日本",
    "🙂",
    "</",
    "<s",
    "|im_end|>",
    "x = 1",
    "\t#",
]


def random_conversation(rng: random.Random, words: list[str]) -> Conversation:
    def text() -> str:
        return "".join(rng.choice([*words, " "]) for _ in range(rng.randint(0, 12)))

    turns = [Turn("system", text())] if rng.random() < 0.5 else []
    if rng.random() < 0.1:
        turns.append(Turn("assistant", text()))
    for _ in range(rng.randint(0 if turns and turns[-1].role == "assistant" else 1, 3)):
        turns += [Turn("user", text()), Turn("assistant", text())]
    return Conversation(tuple(turns))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in conversation.turns]


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer_file: Path):
    from CrystalCoder.tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

    return CrystalCoderTokenizerFast(tokenizer_file=str(tokenizer_file))


def test_the_template_gives_the_builders_ids(tokenizer, hf_tokenizer) -> None:
    """Planted: a newline after `<|im_end|>` in the template -> the first conversation differs, fails."""
    rng = random.Random(7)
    conversations = [random_conversation(rng, WORDS) for _ in range(2000)]
    for conversation, document in zip(conversations, encode(conversations, tokenizer), strict=True):
        assert hf_tokenizer.apply_chat_template(messages(conversation))["input_ids"] == document.ids.tolist()


def test_spelled_out_control_tokens_stay_text_in_both(tokenizer, hf_tokenizer) -> None:
    rng = random.Random(8)
    conversations = [random_conversation(rng, [*WORDS, *CONTROL_TOKENS]) for _ in range(500)]
    for conversation, document in zip(conversations, encode(conversations, tokenizer), strict=True):
        assert hf_tokenizer.encode_chat(messages(conversation)) == document.ids.tolist()


def check_jinja(template: ChatTemplate, ours, theirs, count: int) -> None:
    """Whole conversations, and questions to answer."""
    rendered = jinja_template(template, sorted(ours.controls))
    rng = random.Random(10)
    conversations = [random_conversation(rng, WORDS) for _ in range(count)]
    for conversation, document in zip(conversations, encode(conversations, ours, ChatFormat(template)), strict=True):
        said = messages(conversation)
        assert theirs.apply_chat_template(said, chat_template=rendered)["input_ids"] == document.ids.tolist()
        if said[:-1]:
            asked = theirs.apply_chat_template(said[:-1], chat_template=rendered, add_generation_prompt=True)
            assert asked["input_ids"] == encode_prompt(conversation.turns[:-1], ours, template)


@pytest.mark.parametrize("template", [CRYSTALCHAT, CHATML], ids=lambda template: template.name)
def test_any_template_as_jinja_gives_the_builders_ids(tokenizer, hf_tokenizer, template: ChatTemplate) -> None:
    check_jinja(template, tokenizer, hf_tokenizer, 500)


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=lambda template: template.name)
def test_jinja_with_the_published_tokenizer(shared: Path, template: ChatTemplate) -> None:
    """Also where a template's text stands beside a speaker's: LLaMA's pieces never reach over that seam."""
    from CrystalCoder.tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

    path = shared / "data" / "crystalcoder_tokenizer.json"
    check_jinja(template, load_tokenizer(path), CrystalCoderTokenizerFast(tokenizer_file=str(path)), 300)


def test_jinja_breaks_spelled_out_control_tokens_and_refuses_what_the_format_has_not(tokenizer, hf_tokenizer) -> None:
    rendered = jinja_template(CHATML, sorted(tokenizer.controls))
    ids = hf_tokenizer.apply_chat_template([{"role": "user", "content": "a<|im_end|>b"}], chat_template=rendered)
    assert ids["input_ids"].count(tokenizer.token_id("<|im_end|>")) == 1
    for wrong in ({"role": "tool", "content": ""}, {"role": "user", "content": None}):
        with pytest.raises(Exception, match=r"unknown role tool|must be a string"):
            hf_tokenizer.apply_chat_template([wrong], chat_template=rendered)


def test_the_published_tokenizer_agrees_too(shared: Path) -> None:
    from CrystalCoder.tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

    path = shared / "data" / "crystalcoder_tokenizer.json"
    ours, theirs = load_tokenizer(path), CrystalCoderTokenizerFast(tokenizer_file=str(path))
    rng = random.Random(9)
    conversations = [random_conversation(rng, WORDS) for _ in range(1000)]
    for conversation, document in zip(conversations, encode(conversations, ours), strict=True):
        assert theirs.apply_chat_template(messages(conversation))["input_ids"] == document.ids.tolist()
