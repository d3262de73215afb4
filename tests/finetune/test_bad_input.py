"""Every kind of input that cannot be used: one line with file, place, what is wrong and what to do; nothing is written.

With `--on-error skip` the same reason stands in rejects.jsonl, and the good records around it are kept.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tools.cli import main

GOOD = {"prompt": "say good", "completion": "good ."}


def chat(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **others}


class Bad(NamedTuple):
    """A record (or the bytes of its line) and what must be said of it: the field or fault, and the remedy."""

    record: Any
    says: str
    remedy: str


RECORDS = {
    "turn order: the user twice": Bad(
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        "field 'messages[1]': the user speaks twice in a row",
        "join the two turns",
    ),
    "turn order: the assistant twice": Bad(
        chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "field 'messages[2]': the assistant speaks twice in a row",
        "join the two turns",
    ),
    "turn order: the user last": Bad(
        chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        "field 'messages[2]': the last turn is the user's",
        "add the answer",
    ),
    "turn order: system in the middle": Bad(
        chat(("user", "a"), ("system", "s"), ("assistant", "b")),
        "field 'messages[1]': a system turn",
        "move it to the front",
    ),
    "turn order: counted without the system prompt beside": Bad(
        {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "field 'conversations[1]': the user speaks twice",
        "join the two turns",
    ),
    "system alone": Bad(chat(("system", "s")), "field 'messages[0]': the last turn is the system's", "add the answer"),
    "empty user turn": Bad(
        chat(("user", " \n"), ("assistant", "b")), "field 'messages[0]': the user's text is empty", "fill it"
    ),
    "empty prompt": Bad({"prompt": "", "completion": "c"}, "field 'prompt': the user's text is empty", "fill it"),
    "empty instruction": Bad(
        {"instruction": "", "output": "c"}, "field 'instruction': the user's text is empty", "fill it"
    ),
    "no turns": Bad(chat(), "field 'messages' must be a list of turns, not an empty list", ""),
    "unknown role": Bad(chat(("tool", "a")), "field 'messages[0].role': unknown role 'tool'", "use one of system"),
    "no role": Bad({"messages": [{"content": "a"}]}, "field 'messages[0].role' is missing", ""),
    "no content": Bad({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing", ""),
    "content of another type": Bad(chat(("user", 7)), "field 'messages[0].content' must be text, not a number", ""),
    "content null": Bad(
        chat(("user", "a"), ("assistant", None)), "field 'messages[1].content' must be text, not null", ""
    ),
    "a part that is an image": Bad(
        chat(("user", [{"type": "image_url", "image_url": "x"}])),
        "field 'messages[0].content' must be text, not a list",
        "",
    ),
    "weight": Bad(
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        "field 'messages[0].weight' must be 0 or 1",
        "",
    ),
    "missing key": Bad(
        {"prompt": "a"}, "unknown format with the fields prompt", "expected one of messages; conversations; prompt"
    ),
    "no object": Bad(["a"], "a record must be an object, not a list", "write it as one of the formats"),
    "half a character": Bad(
        b'{"prompt": "\\ud800", "completion": "c"}', "field 'prompt' holds half of a surrogate pair", "repair"
    ),
    "not JSON": Bad(b'{"prompt": "a", }', "not valid JSON", "repair or remove it"),
    "not UTF-8": Bad(b'{"prompt": "caf\xe9", "completion": "c"}', "not UTF-8", "repair or remove it"),
    "row of another length": Bad(
        {"token_ids": [1, 2], "loss_mask": [1, 1], "label_ids": [2, 3]},
        "a processed row of 2 tokens among rows of 64",
        "--max-seq-length",
    ),
    "row with another mask": Bad(
        {"token_ids": [1] * 64, "loss_mask": [2] * 64, "label_ids": [1] * 64},
        "field 'loss_mask' holds other numbers",
        "",
    ),
    "row with shifted labels": Bad(
        {"token_ids": [*range(64)], "loss_mask": [1] * 64, "label_ids": [*range(64)]},
        "labels are not the tokens that follow",
        "process it again",
    ),
    "row of another vocabulary": Bad(
        {"token_ids": [9999] * 64, "loss_mask": [1] * 64, "label_ids": [9999] * 64},
        "ids outside the tokenizer's vocabulary",
        "",
    ),
}


@pytest.fixture
def prepare(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `finetune prepare`; exit status, standard output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        options = ["--out", tmp_path / "out", "--tokenizer", tokenizer_file, "--max-seq-length", 64, "--system", ""]
        with pytest.raises(SystemExit) as status:
            main(["finetune", "prepare", *map(str, [*options, *arguments])])
        captured = capsys.readouterr()
        return int(status.value.code or 0), captured.out, captured.err

    return run


def refused(result: tuple[int, str, str], tmp_path: Path) -> str:
    """The one line of a refusal, after which nothing is left."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    return err


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record(name: str, tmp_path: Path, prepare) -> None:
    """Stops with its line, or is left out and listed. Planted: rejects not written -> all fail."""
    record, says, remedy = RECORDS[name]
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    good = json.dumps(GOOD).encode()
    source = tmp_path / "chats.jsonl"
    source.write_bytes(b"\n".join([good, b"", line, good.replace(b"good", b"fine")]))

    said = refused(prepare(source), tmp_path)
    place = "record 3" if "row" in name and "mask" not in name else "3"
    assert said.startswith(f"error: {source}:{place}: ")
    assert says in said
    assert remedy in said
    assert said.endswith("mend the file, or leave such records out with --on-error skip\n")

    status, out, _ = prepare(source, "--on-error", "skip")
    assert status == 0
    assert "2 conversations" in out
    assert "1 rejected" in out
    (reject,) = [json.loads(text) for text in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert (reject["file"], reject["place"]) == (str(source), place)
    assert says in reject["reason"]


def damaged(name: str, tmp_path: Path) -> Path:
    """A file that can be read up to its second record only."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    records = [{"prompt": f"say {i}", "completion": f"{i} ."} for i in range(3000)]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        path.write_bytes(path.read_bytes()[:-20])
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode())[:-200])
    elif name == "bytes.json":
        path.write_bytes(json.dumps([GOOD]).encode().replace(b"good .", b"caf\xe9"))
    else:
        path.write_text("[\n" + ",\n".join(map(json.dumps, records[:2])) + ",\n{]")
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.parquet", "is not a whole parquet file"),
        ("a.jsonl.gz", "damaged or cut off"),
        ("a.json", ":4: not valid JSON"),
        ("bytes.json", ":1: not UTF-8"),
    ],
)
def test_a_damaged_file(name: str, says: str, tmp_path: Path, prepare) -> None:
    """Stops, or what can be read is kept and the file listed."""
    path = damaged(name, tmp_path)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(GOOD))
    said = refused(prepare(good, path), tmp_path)
    assert str(path) in said
    assert says in said
    status, out, _ = prepare(good, path, "--on-error", "skip")
    assert (status, "1 conversations" in out) == (0, True)
    (reject,) = [json.loads(text) for text in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert reject["file"] == str(path)
    assert reject["place"].startswith("after record ")
    assert reject["reason"].endswith("the rest is left out")


SETTINGS: list[tuple[list[str], str]] = [
    (["absent.jsonl"], "absent.jsonl: no such file or folder"),
    (["rows.csv"], "rows.csv: examples are read from .json, .jsonl, .parquet and .txt: rename or convert it"),
    (["empty"], "empty: holds no file that ends in"),
    (["good.jsonl@0"], "the number behind @ must be a number above 0"),
    (["good.jsonl@nan"], "the number behind @ must be a number above 0"),
    (["good.jsonl", "--recipe", "mix.yaml"], "give source files, or --recipe, and not both"),
    ([], "give source files, or --recipe, and not both"),
    (["--recipe", "absent.yaml"], "absent.yaml: no such recipe: give a file, or one of code_alpaca, crystalchat"),
    (["good.jsonl", "--root", "."], "--root is the folder of a recipe's files"),
    (["good.jsonl", "--template", "gpt"], "chat template gpt: is none of crystalchat, chatml, llama2 and no file"),
    (["good.jsonl", "--template", "mix.yaml"], "mix.yaml: unknown field 'sources'"),
    (["good.jsonl", "--template", "stopless.yaml"], "no control token ends an answer, so a model could never stop"),
    (["good.jsonl", "--template", "space.yaml"], "a space before the answer"),
    (["good.jsonl", "--template", "other.yaml"], "has no <|assistant|>: use a tokenizer with"),
    (["good.jsonl", "--tokenizer", "absent"], "absent: no such tokenizer file"),
    (["good.jsonl", "--packing", "best-fit", "--long", "cut"], "best-fit cuts no conversation: choose --long truncate"),
    (["empty.jsonl"], "no assistant token to train on in the whole data (no records): are these the right files"),
    (["context.jsonl"], "no assistant token to train on in the whole data (1 conversations, 2 turns"),
    (["good.jsonl", "--max-seq-length", "4", "--long", "drop"], "(1 conversations, 2 turns, 1 dropped)"),
    (["good.jsonl", "--valid", "0.9", "--seed", "3"], "--valid 0.9 holds out every conversation"),
]


@pytest.mark.parametrize(("arguments", "says"), SETTINGS, ids=[says for _, says in SETTINGS])
def test_settings_and_files(
    arguments: list[str], says: str, tmp_path: Path, prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    control = "before: [], after: ['<|im_end|>']"
    files = {
        "good.jsonl": json.dumps(GOOD),
        "rows.csv": "a,b",
        "empty.jsonl": "\n",
        "context.jsonl": json.dumps(
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}
        ),
        "mix.yaml": "sources: [{path: good.jsonl}]",
        "stopless.yaml": "{system: {}, user: {}, assistant: {after: [x]}}",
        "space.yaml": f"{{system: {{}}, user: {{before: ['Q: '], after: ['A: ']}}, assistant: {{{control}}}}}",
        "other.yaml": "{system: {}, user: {}, assistant: {before: ['<|assistant|>'], after: ['<|im_end|>']}}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    assert says in refused(prepare(*arguments), tmp_path)
