"""The tokenizer's chat template and `encode_chat` give the builder's ids: what is trained is what is asked."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import CONTROL_TOKENS, ChatFormat, Conversation, Turn, encode, encode_prompt
from finetune.jinja import jinja_template
from finetune.templates import CRYSTALCHAT, ChatTemplate, load_template

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


# Words around the texts, among them what Jinja and JSON would take for their own, and a second form of the user's turn.
YAML = r"""
start: ["<s>"]
system: {before: ["<|sys_start|>", "## \"System\" {{ x }} \\ 🙂:\n"], after: ["<|sys_end|>", "\n"]}
user: {before: ["<|im_start|>", "## User's {% if %}:\n"], after: ["\n## Assistant:"]}
user_after_system: {before: ["## First {# user #}:\n"], after: ["\n## Assistant:"]}
assistant: {after: ["\n", "<|im_end|>", "\n"], text: " {text}"}
end: ["</s>"]
strip: true
"""


@pytest.fixture(scope="module", params=["crystalchat", "chatml", "llama2", "yaml"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    if request.param != "yaml":
        return load_template(request.param)
    path = tmp_path_factory.mktemp("template") / "own.yaml"
    path.write_text(YAML)
    return load_template(str(path))


def as_exported(tokenizer_file: Path, folder: Path, template: ChatTemplate, tokenizer_class: str):
    """What `from_pretrained` makes of a model's folder with the template in it."""
    from transformers import PreTrainedTokenizerFast

    from CrystalCoder.tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    program = jinja_template(template, load_tokenizer(tokenizer_file).controls)
    (folder / "chat_template.jinja").write_text(program, encoding="utf-8")
    classes = {"own": CrystalCoderTokenizerFast, "plain": PreTrainedTokenizerFast}
    return classes[tokenizer_class].from_pretrained(folder)


@pytest.mark.parametrize("tokenizer_class", ["own", "plain"])
def test_every_template_gives_the_builders_ids(
    tokenizer, tokenizer_file: Path, template: ChatTemplate, tmp_path: Path, tokenizer_class: str
) -> None:
    """Whole conversations, and prompts up to where the answer begins.

    Planted: `end` left out of the program -> fails; the generation prompt left out -> ChatML's prompts differ, fails.
    """
    theirs = as_exported(tokenizer_file, tmp_path, template, tokenizer_class)
    rng = random.Random(7)
    conversations = [random_conversation(rng, WORDS) for _ in range(1000)]
    for conversation, document in zip(
        conversations, encode(conversations, tokenizer, ChatFormat(template)), strict=True
    ):
        asked = messages(conversation)
        assert theirs.apply_chat_template(asked)["input_ids"] == document.ids.tolist()
        if len(asked) > 1:
            prompt = theirs.apply_chat_template(asked[:-1], add_generation_prompt=True)["input_ids"]
            assert prompt == encode_prompt(conversation.turns[:-1], tokenizer, template)
            if asked[-2]["role"] == "user":
                assert prompt == document.ids.tolist()[: len(prompt)]


def test_spelled_out_control_tokens_stay_text_in_every_template(
    tokenizer, tokenizer_file: Path, template: ChatTemplate, tmp_path: Path
) -> None:
    """`encode_chat` has the builder's ids; `apply_chat_template` has no control token more than the builder."""
    theirs = as_exported(tokenizer_file, tmp_path, template, "own")
    rng = random.Random(8)
    conversations = [random_conversation(rng, [*WORDS, *CONTROL_TOKENS]) for _ in range(500)]
    controls = set(tokenizer.controls.values())
    for conversation, document in zip(
        conversations, encode(conversations, tokenizer, ChatFormat(template)), strict=True
    ):
        asked = messages(conversation)
        ids = document.ids.tolist()
        assert theirs.encode_chat(asked) == ids
        rendered = theirs.apply_chat_template(asked)["input_ids"]
        assert [i for i in rendered if i in controls] == [i for i in ids if i in controls]


def test_crystalchats_program_is_the_tokenizers_own(tokenizer_file: Path, tmp_path: Path) -> None:
    from CrystalCoder.tokenization_crystalcoder_fast import CrystalCoderTokenizerFast

    bare = CrystalCoderTokenizerFast(tokenizer_file=str(tokenizer_file))
    exported = as_exported(tokenizer_file, tmp_path, CRYSTALCHAT, "own")
    assert exported.chat_template != bare.chat_template
    rng = random.Random(10)
    for _ in range(500):
        asked = messages(random_conversation(rng, [*WORDS, *CONTROL_TOKENS]))
        rendered = exported.apply_chat_template(asked, tokenize=False)
        assert rendered == bare.apply_chat_template(asked, tokenize=False)
    for wrong in ([("tool", "x")], [("user", "x"), ("system", "y")], [("user", None)]):
        for tokenizer in (exported, bare):
            with pytest.raises(Exception, match=r"unknown role tool|must be the first|must be a string"):
                tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in wrong])


def test_the_published_tokenizer_agrees_too(shared: Path, template: ChatTemplate, tmp_path: Path) -> None:
    file = shared / "data" / "crystalcoder_tokenizer.json"
    ours, theirs = load_tokenizer(file), as_exported(file, tmp_path, template, "plain")
    rng = random.Random(9)
    conversations = [random_conversation(rng, WORDS) for _ in range(400)]
    for conversation, document in zip(conversations, encode(conversations, ours, ChatFormat(template)), strict=True):
        assert theirs.apply_chat_template(messages(conversation))["input_ids"] == document.ids.tolist()
