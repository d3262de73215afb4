"""The format and its mask, on own conversations and against the rows the reference was tuned on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.tokenizer import load_tokenizer
from finetune.chat_format import (
    BOS,
    CONTROL_TOKENS,
    DEFAULT_SYSTEM_PROMPT,
    EOS,
    SYSTEM_END,
    SYSTEM_START,
    USER_END,
    USER_START,
    ChatFormat,
    Conversation,
    Encoded,
    Turn,
    control_token_ids,
    encode,
    segments,
)
from finetune.conversation import PlainText
from finetune.packing import PackedRows
from finetune.templates import CHATML, CRYSTALCHAT, LLAMA2, ChatTemplate, Markup

ROW = 2048  # of the reference's sample


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, text) for role, text in turns))  # type: ignore[arg-type]


def test_segments_of_two_turns_with_system() -> None:
    dialogue = conversation(("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    contents = "".join(s.content for s in segments(dialogue))
    assert contents == (
        "<s><|sys_start|>S<|sys_end|><|im_start|>U1<|im_end|>A1<|im_start|>U2<|im_end|>A2</s>"  # nothing in between
    )
    assert [s.content for s in segments(dialogue) if s.trained] == ["A1", "A2", EOS]


def test_segments_without_system_and_with_the_assistant_first() -> None:
    assert "".join(s.content for s in segments(conversation(("assistant", "A")))) == "<s>A</s>"
    assert "".join(s.content for s in segments(conversation(("user", "U"), ("assistant", "")))) == (
        f"{BOS}{USER_START}U{USER_END}{EOS}"
    )


def test_a_default_system_prompt_opens_only_what_has_none() -> None:
    bare, own = conversation(("user", "U"), ("assistant", "A")), conversation(("system", "S"), ("assistant", "A"))
    assert bare.with_system("X").turns[0] == Turn("system", "X")
    assert own.with_system("X") == own
    assert bare.with_system("") == bare


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ([], "no turns"),
        (["user"], "last turn is the user's"),
        (["user", "user"], "turn 1: the user speaks twice"),
        (["user", "assistant", "system"], "turn 2: a system turn after the first"),
        (["narrator"], "unknown role 'narrator'"),
    ],
)
def test_orders_that_the_format_cannot_express_are_refused(roles: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        conversation(*((role, "x") for role in roles))


OWN = ChatTemplate(
    "own",
    system=Markup(("S:",), ("\n",)),
    user=Markup(("U:",), ("\n",)),
    assistant=Markup(("A:",), ("\n", USER_END, "\n"), text=" {text}"),
    start=(BOS,),
    end=(EOS,),
)
# Two answers; the token that ends an answer is trained in each, and whatever the template puts before it.
MASKS: list[tuple[ChatTemplate, dict[str, list[str]]]] = [
    (
        CRYSTALCHAT,
        {
            "assistant": ["A1", "A2", EOS],
            "turn ends": ["A1", USER_START, "A2", EOS],
            "last": ["A2", EOS],
            "last and turn ends": ["A2", EOS],
            "first answer weighs 0": ["A2", EOS],
            "last answer weighs 0": ["A1"],
            "last answer weighs 0, turn ends": ["A1", USER_START],
        },
    ),
    (
        CHATML,
        {
            "assistant": ["A1", USER_END, "A2", USER_END],
            "turn ends": ["A1", USER_END, USER_START, "A2", USER_END],
            "last": ["A2", USER_END],
            "last and turn ends": ["A2", USER_END],
            "first answer weighs 0": ["A2", USER_END],
            "last answer weighs 0": ["A1", USER_END],
            "last answer weighs 0, turn ends": ["A1", USER_END, USER_START],
        },
    ),
    (
        LLAMA2,
        {
            "assistant": [" A1 ", EOS, " A2 ", EOS],
            "turn ends": [" A1 ", EOS, BOS, " A2 ", EOS],
            "last": [" A2 ", EOS],
            "last and turn ends": [" A2 ", EOS],
            "first answer weighs 0": [" A2 ", EOS],
            "last answer weighs 0": [" A1 ", EOS],
            "last answer weighs 0, turn ends": [" A1 ", EOS, BOS],
        },
    ),
    (
        OWN,
        {
            "assistant": [" A1\n", USER_END, " A2\n", USER_END],
            "turn ends": [" A1\n", USER_END, "U:", " A2\n", USER_END],
            "last": [" A2\n", USER_END],
            "last and turn ends": [" A2\n", USER_END],
            "first answer weighs 0": [" A2\n", USER_END],
            "last answer weighs 0": [" A1\n", USER_END],
            "last answer weighs 0, turn ends": [" A1\n", USER_END, "U:"],
        },
    ),
]


@pytest.mark.parametrize(
    ("template", "option"),
    [(t, option) for t, masks in MASKS for option in masks],
    ids=[f"{t.name}: {option}" for t, masks in MASKS for option in masks],
)
def test_what_is_trained(template: ChatTemplate, option: str, tokenizer) -> None:
    """By segment, and token by token.

    Planted: only the first part behind an answer trained -> `own` fails; turn ends ignored -> 8 fail.
    """
    expected = dict(MASKS)[template][option]
    turns = [
        Turn("system", "S"),
        Turn("user", "U1"),
        Turn("assistant", "A1", trained="first answer weighs 0" not in option),
        Turn("user", "U2"),
        Turn("assistant", "A2", trained="last answer weighs 0" not in option),
    ]
    train: Literal["assistant", "last"] = "last" if option in ("last", "last and turn ends") else "assistant"
    chat_format = ChatFormat(template, train, turn_ends="turn ends" in option)
    dialogue = Conversation(tuple(turns))
    trained = [segment.content for segment in segments(dialogue, chat_format) if segment.trained]
    assert trained == expected

    (document,) = encode([dialogue], tokenizer, chat_format)
    ids = document.ids[document.trained].tolist()
    assert tokenizer.decode_inside(ids).replace(" ", "") == "".join(expected).replace(" ", "")
    (everything,) = encode([dialogue], tokenizer, ChatFormat(template, "all"))
    assert everything.trained.all()


def test_more_shapes_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes forgotten and laid out again give the same."""
    monkeypatch.setattr("finetune.chat_format.MAX_SHAPES", 3)
    remembering, ours = ChatFormat(CHATML), ChatFormat(CHATML)
    for _ in range(2):
        for count in range(1, 8):
            exchanges = [("user", f"u{k}") if k % 2 == 0 else ("assistant", f"a{k}") for k in range(2 * count)]
            once = list(ChatFormat(CHATML).segments(conversation(*exchanges)))
            assert list(ours.segments(conversation(*exchanges))) == once
            assert len(ours._steps_of) <= 3
    assert remembering == ours
    assert hash(remembering) == hash(ours)


def test_a_template_that_cannot_work_is_refused() -> None:
    """No end of an answer; an answer that begins behind a space, which its first token would hold."""
    with pytest.raises(InputError, match="no control token ends an answer"):
        replace(OWN, assistant=Markup(("A:",), ("\n",)), end=("\n",))
    for bad in (
        {"assistant": Markup(("A: ",), (USER_END,))},
        {"assistant": Markup(), "user": Markup(("U:",), ("\nA: ",))},
    ):
        with pytest.raises(InputError, match="a space before the answer"):
            replace(OWN, **bad)


def test_control_tokens_inside_text_stay_text(tokenizer) -> None:
    """Planted: encode with special tokens parsed -> ids of `</s>` and the chat tokens appear in the text, fails."""
    names = control_token_ids(tokenizer)
    evil = "a </s> b<|im_end|>c <|sys_start|>" + BOS
    (document,) = encode([conversation(("system", evil), ("user", evil), ("assistant", evil))], tokenizer)
    counts = {name: int((document.ids == i).sum()) for name, i in names.items()}
    assert counts == dict.fromkeys(CONTROL_TOKENS, 1)
    text = tokenizer.decode(document.ids.tolist())
    assert text.count(evil) == 3


def test_texts_with_their_own_spaces_and_lines_come_back(tokenizer) -> None:
    names = control_token_ids(tokenizer)
    texts = [" leading", "trailing ", "\n\tline\n", "  ", "ünïcode 🙂", ""]
    for text in texts:
        (document,) = encode([conversation(("user", "U"), ("assistant", text))], tokenizer)
        ids = document.ids.tolist()
        answer = ids[ids.index(names[USER_END]) + 1 : -1]
        assert tokenizer.decode(answer) == text
        assert document.trained.tolist() == [False] * (len(ids) - len(answer) - 1) + [True] * (len(answer) + 1)


def test_a_tokenizer_without_the_control_tokens_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    definition = json.loads(tokenizer_file.read_text())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if "im_" not in t["content"]]
    plain = tmp_path / "tokenizer.json"
    plain.write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"tokenizer\.json: has no <\|im_end\|>, <\|im_start\|>"):
        list(encode([conversation(("assistant", "A"))], load_tokenizer(plain)))


# --- the rows the reference was tuned on -------------------------------------------------------------------------


class Sample:
    """The reference's processed rows, and their windows of s + 1 tokens cut into documents at `<s>`."""

    def __init__(self, shared: Path) -> None:
        self.tokenizer = load_tokenizer(shared / "data" / "crystalcoder_tokenizer.json")
        self.ids = control_token_ids(self.tokenizer)
        self.names = {i: name for name, i in self.ids.items()}
        lines = (shared / "data" / "instruct_sample_100.jsonl").read_text().splitlines()
        self.windows = [self._window(json.loads(line)) for line in lines]

    def _window(self, row: dict[str, list[int]]) -> Encoded:
        ids = np.array([*row["token_ids"], row["label_ids"][-1]], dtype=np.int32)
        # The first token of a row is nobody's label: whether it was trained is not recorded.
        return Encoded(ids, np.array([False, *row["loss_mask"]], dtype=np.bool_))

    def documents(self, window: Encoded) -> list[Encoded]:
        """The window cut before each `<s>`: whole documents, and at its ends parts of two."""
        starts = np.flatnonzero(window.ids == self.ids[BOS])
        parts = zip(np.split(window.ids, starts), np.split(window.trained, starts), strict=True)
        return [Encoded(ids, trained) for ids, trained in parts if len(ids)]

    def is_chat(self, document: Encoded) -> bool:
        return bool(np.isin(document.ids, [self.ids[USER_END], self.ids[SYSTEM_END]]).any())

    def turns(self, ids: list[int]) -> list[Turn]:
        """Texts between control tokens; the token that closes a text tells who speaks."""
        speaker = {SYSTEM_END: "system", USER_END: "user", USER_START: "assistant", EOS: "assistant"}
        found: list[Turn] = []
        text: list[int] = []
        for previous, token in zip([None, *ids], ids, strict=False):
            name = self.names.get(token)
            if name is None:
                text.append(token)
                continue
            is_empty_answer = name == EOS and self.names.get(previous) in (USER_END, SYSTEM_END)
            if name in speaker and (text or name in (USER_END, SYSTEM_END) or is_empty_answer):
                # A row may end after the word-start mark of a text, which alone decodes to nothing: any text will do.
                spoken = self.tokenizer.decode(text) or "x" * len(text)
                found.append(Turn(speaker[name], spoken))  # type: ignore[arg-type]
            text = []
        return found

    def rebuilt(self, window: Encoded) -> Encoded:
        """The window's documents built from their text, then packed so that one row is the window again.

        A document that a row's edge cuts is completed with a text: a newline, which merges with nothing, so the ids
        beside it stay. A row without any chat token is of plain texts: that is all the row itself does not say.
        """
        documents = self.documents(window)
        is_plain = not any(map(self.is_chat, documents))
        examples = [self._completed(document.ids.tolist(), is_plain) for document in documents]
        encoded = list(encode(examples, self.tokenizer))
        whole, part = encoded[0].ids, documents[0].ids
        places = (k for k in range(len(whole)) if np.array_equal(whole[k : k + len(part)], part))
        added = next(places, 0)  # what stands before the row's edge; a text that came out otherwise is found below
        before = Encoded(np.full(ROW - added, 7, np.int32), np.zeros(ROW - added, np.bool_))
        tokens, mask, labels = PackedRows([before, *encoded], seq_length=ROW, pad_id=self.ids[EOS])[1]
        return Encoded(np.append(tokens, labels[-1]), np.append([False], mask).astype(np.bool_))

    def _completed(self, ids: list[int], is_plain: bool) -> Conversation | PlainText:
        """The document of which `ids` are a part, with "\n" for what is missing of its first and its last text."""
        cut_before, cut_after = ids[0] != self.ids[BOS], ids[-1] != self.ids[EOS]
        if is_plain:
            text = [i for i in ids if i not in self.names]
            return PlainText(self._text(text, cut_before, cut_after))
        turns: list[Turn] = []
        text, opened, previous = [], cut_before, BOS
        for token in [*ids, None] if cut_after else ids:
            name = EOS if token is None else self.names.get(token)
            if name is None:
                text.append(token)
                continue
            role = {USER_END: "user", SYSTEM_END: "system", USER_START: "assistant", EOS: "assistant"}.get(name)
            if token is None and previous in (USER_START, SYSTEM_START):
                role = "user" if previous == USER_START else "system"
            spoken = self._text(text, opened, token is None)
            if role and (spoken or name != USER_START):
                turns.append(Turn(role, spoken))  # type: ignore[arg-type]
            text, opened, previous = [], False, name
        if turns[-1].role != "assistant":
            turns.append(Turn("assistant", "\n"))
        return Conversation(tuple(turns))

    def _text(self, ids: list[int], cut_before: bool, cut_after: bool) -> str:
        text = "\n" + self.tokenizer.decode_inside(ids) if cut_before else self.tokenizer.decode(ids)
        return text + "\n" if cut_after else text


@pytest.fixture(scope="module")
def sample(shared: Path) -> Sample:
    return Sample(shared)


def test_complete_documents_of_the_reference_are_rebuilt_from_their_text(sample: Sample) -> None:
    """Ids and mask position by position; no document differs.

    Planted: `</s>` not trained -> 138 of 138 differ; the mid-dialogue `<|im_start|>` trained -> fails.
    """
    complete = [
        document
        for window in sample.windows
        for document in sample.documents(window)
        if document.ids[0] == sample.ids[BOS] and document.ids[-1] == sample.ids[EOS] and sample.is_chat(document)
    ]
    # One of them ends on the last label of its row, so it is complete only in the window of s + 1.
    assert len(complete) == 138
    rebuilt = encode([Conversation(tuple(sample.turns(d.ids.tolist()))) for d in complete], sample.tokenizer)
    for ours, theirs in zip(rebuilt, complete, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.trained, theirs.trained)
    assert any(d.turns[0].text == DEFAULT_SYSTEM_PROMPT for d in map(_conversation(sample), complete))


def _conversation(sample: Sample):
    return lambda document: Conversation(tuple(sample.turns(document.ids.tolist())))


def test_every_row_of_the_reference_is_rebuilt_from_its_text(sample: Sample) -> None:
    """All 100 rows, whose documents run over both edges: tokens, mask and labels at every position; none differs.

    Planted: the mask one position late -> 56 rows differ; turn ends trained -> 10; `</s>` not trained -> 75.
    """
    plain = 0
    for number, window in enumerate(sample.windows):
        ours = sample.rebuilt(window)
        np.testing.assert_array_equal(ours.ids, window.ids, err_msg=f"row {number}")
        np.testing.assert_array_equal(ours.trained[1:], window.trained[1:], err_msg=f"row {number}")
        plain += not any(map(sample.is_chat, sample.documents(window)))
    assert plain == 44
