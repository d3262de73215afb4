"""Mistakes that tuning pipelines are known for, each by name, from a user's file to the tensors that the trainer takes.

The mean of means over micro-batches is tested in tests/training (rows of unequal masks against a plain loop), the
packer's time in test_packing.py.
"""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from finetune.chat_format import ChatFormat
from finetune.prepare import PrepareOptions, prepare
from finetune.recipe import SourceSettings
from finetune.templates import TEMPLATES
from megatron.crystalcoder.data.loader import micro_batches, open_data
from megatron.crystalcoder.training.config import DataSettings

LENGTH, SYSTEM = 384, "Be brief."


def dialogues() -> list[list[tuple[str, str]]]:
    """Exchanges of one to three turns; no answer begins with a space, none is empty."""
    rng = random.Random(4)
    words = ["def f(x):", "return", "naïve 🙂", "a  b", "</s>", "<|im_end|>", "\n", "7"]
    made = []
    for number in range(60):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        made.append([(f"ask {number}: {text}", f"say {number} {text}!") for text in texts])
    return made


def expected(tokenizer, name: str, exchanges: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids and what is trained, written down for each format without the builder."""
    bos, eos, start, end, system, system_end = (
        [tokenizer.token_id(token)]
        for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|sys_start|>", "<|sys_end|>")
    )
    pieces: list[tuple[list[int], bool]] = []
    encode, inside = tokenizer.encode, lambda text: tokenizer.encode_inside(text).tolist()
    if name == "crystalchat":
        pieces += [(bos + system + encode(SYSTEM) + system_end, False)]
        for user, answer in exchanges:
            pieces += [(start + encode(user) + end, False), (encode(answer), True)]
        pieces += [(eos, True)]
    elif name == "chatml":
        pieces += [(bos + start + encode(f"system\n{SYSTEM}") + end, False)]
        for user, answer in exchanges:
            pieces += [(encode("\n") + start + encode(f"user\n{user}") + end + encode("\n"), False)]
            pieces += [(start + encode("assistant\n"), False), (inside(answer) + end, True)]
        pieces += [(encode("\n") + eos, False)]
    else:
        asked = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n"
        for user, answer in exchanges:
            pieces += [(bos + encode(f"{asked}{user.strip()} [/INST]"), False), (inside(f" {answer} ") + eos, True)]
            asked = "[INST] "
    ids = [token for piece, _ in pieces for token in piece]
    return ids, [trained for piece, trained in pieces for _ in piece]


def loaded(folder: Path, *, isolate: bool = False) -> list[dict[str, np.ndarray]]:
    """Every row as the trainer gets it."""
    settings = DataSettings(paths=(folder,), order="single", isolate_documents=isolate)
    rows, order = open_data(settings, seq_length=LENGTH, vocab_size=4096)
    batches = micro_batches(
        rows, order, consumed_samples=0, micro_batch_size=1, dp_rank=0, dp_size=1, isolate_documents=isolate
    )
    return [{name: tensor[0].numpy() for name, tensor in batch.items()} for batch in islice(batches, len(rows))]


Expected = list[tuple[list[int], list[bool]]]


@pytest.fixture(params=list(TEMPLATES))
def prepared(request: pytest.FixtureRequest, tmp_path: Path, tokenizer) -> tuple[Path, Expected]:
    """A folder with rows of either packing, and each dialogue's ids and trained tokens."""
    turns = [[turn for pair in d for turn in zip(("user", "assistant"), pair, strict=True)] for d in dialogues()]
    records = [{"messages": [{"role": role, "content": text} for role, text in dialogue]} for dialogue in turns]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    chat_format = ChatFormat(TEMPLATES[request.param])
    for packing in ("best-fit", "concatenate"):
        options = PrepareOptions(max_seq_length=LENGTH, packing=packing, system=SYSTEM, chat_format=chat_format)  # type: ignore[arg-type]
        prepare([SourceSettings(tmp_path / "chats.json")], tmp_path / packing, tokenizer, options)
    return tmp_path, [expected(tokenizer, request.param, dialogue) for dialogue in dialogues()]


def test_mask_off_by_one_or_lost_in_whole_documents(prepared: tuple[Path, Expected]) -> None:
    """Planted: the mask one position late, the mask all 1 -> fails."""
    folder, documents = prepared
    found = []
    for row in loaded(folder / "best-fit", isolate=True):
        for number in range(int(row["documents"].max()) + 1):
            here = row["documents"] == number
            tokens, labels, mask = (row[name][here] for name in ("tokens", "labels", "loss_mask"))
            which = next(i for i, (ids, _) in enumerate(documents) if tokens[: len(ids)].tolist() == ids)
            ids, trained = documents[which]
            assert labels[: len(ids) - 1].tolist() == ids[1:]
            assert mask[: len(ids) - 1].tolist() == trained[1:]
            assert not mask[len(ids) - 1 :].any()
            assert row["position_ids"][here].tolist() == list(range(len(tokens)))
            found.append(which)
    assert sorted(found) == list(range(len(documents)))


def test_mask_off_by_one_or_lost_in_concatenated_documents(prepared: tuple[Path, Expected], tokenizer) -> None:
    folder, documents = prepared
    ids = [token for piece, _ in documents for token in piece]
    trained = [flag for _, piece in documents for flag in piece]
    fill = -(len(ids) - 1) % LENGTH
    ids, trained = ids + [tokenizer.eos_id] * fill, trained + [False] * fill
    windows = range(0, len(ids) - 1, LENGTH)
    stream = sorted(
        (ids[at : at + LENGTH], trained[at + 1 : at + LENGTH + 1], ids[at + 1 : at + LENGTH + 1]) for at in windows
    )
    rows = loaded(folder / "concatenate")
    assert sorted(tuple(row[name].tolist() for name in ("tokens", "loss_mask", "labels")) for row in rows) == stream


def test_end_of_turn_never_supervised(
    prepared: tuple[Path, Expected], tokenizer, request: pytest.FixtureRequest
) -> None:
    """Every answer's end token is a trained label, wherever the format has one."""
    folder, _ = prepared
    name = request.node.callspec.params["prepared"]
    answers = sum(map(len, dialogues())) if name != "crystalchat" else len(dialogues())
    end = tokenizer.token_id(TEMPLATES[name].answer_end)
    for packing in ("best-fit", "concatenate"):
        rows = loaded(folder / packing)
        assert sum(int(((row["labels"] == end) & (row["loss_mask"] == 1)).sum()) for row in rows) == answers
