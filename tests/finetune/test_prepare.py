"""`prepare` from files to rows: sources, shares, held-out conversations, repetitions, provenance, refusals."""

from __future__ import annotations

import errno
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from finetune.chat_format import ChatFormat
from finetune.commands import report
from finetune.prepare import PrepareOptions, prepare
from finetune.recipe import SourceSettings, parse_source, read_recipe
from finetune.show import runs, show, write_html
from finetune.store import ExampleStore
from tools.cli import main

LENGTH = 64
BEST_FIT = PrepareOptions(max_seq_length=LENGTH, packing="best-fit", system="")


def write_pairs(path: Path, names: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": f"say {name}", "completion": f"{name} ."}) for name in names))
    return path


def rows_of(folder: Path) -> list[tuple[np.ndarray, list]]:
    found = []
    for path in sequence_files(folder):
        with SequenceFile(path) as file:
            found += [(file[i], file.spans(i)) for i in range(len(file))]
    return found


def documents(folder: Path, tokenizer) -> list[tuple[str, str, int]]:
    """Text, file and record of every document in rows of whole documents."""
    found = []
    for planes, spans in rows_of(folder):
        text = tokenizer.decode(planes[0])
        pieces = [piece for piece in text.replace("<s>", "\x00<s>").split("\x00") if piece]
        pieces = [piece.split("</s>")[0] for piece in pieces]
        assert len(pieces) == len(spans)
        found += [(piece, Path(span.path).name, span.document) for piece, span in zip(pieces, spans, strict=True)]
    return found


def test_rows_say_which_records_they_hold(tmp_path: Path, tokenizer) -> None:
    names = [f"word{i}" for i in range(30)]
    source = SourceSettings(write_pairs(tmp_path / "pairs.jsonl", names))
    facts = prepare([source], tmp_path / "rows", tokenizer, BEST_FIT)
    found = documents(tmp_path / "rows", tokenizer)
    assert sorted(number for _, _, number in found) == list(range(30))
    for text, file, number in found:
        assert file == "pairs.jsonl"
        assert text.endswith(f" word{number} .")
    assert facts["train"]["documents"] == 30
    assert facts["train"]["tokens"] == sum(len(p[0]) for p, _ in rows_of(tmp_path / "rows")) - _padding(
        tmp_path, tokenizer
    )
    written = json.loads((tmp_path / "rows/prepare.json").read_text())
    assert written == facts


def _padding(folder: Path, tokenizer) -> int:
    ids = np.concatenate([p[0] for p, _ in rows_of(folder / "rows")])
    return int((ids == tokenizer.eos_id).sum()) - 30


def test_validation_is_by_conversation_and_stays_with_its_content(tmp_path: Path, tokenizer) -> None:
    """A quarter held out; none on both sides; more data changes nobody's side."""
    names = [f"word{i}" for i in range(200)]
    first = SourceSettings(write_pairs(tmp_path / "a.jsonl", names[:150]))
    more = SourceSettings(write_pairs(tmp_path / "b.jsonl", names[::-1]))
    options = PrepareOptions(max_seq_length=LENGTH, packing="best-fit", system="", valid=0.25)
    prepare([first], tmp_path / "one", tokenizer, options)
    prepare([more], tmp_path / "two", tokenizer, options)
    held = {text for text, _, _ in documents(tmp_path / "one/valid", tokenizer)}
    trained = {text for text, _, _ in documents(tmp_path / "one", tokenizer)}
    assert len(held | trained) == 150
    assert not held & trained
    assert 20 < len(held) < 60
    assert held <= {text for text, _, _ in documents(tmp_path / "two/valid", tokenizer)}
    assert trained <= {text for text, _, _ in documents(tmp_path / "two", tokenizer)}


def test_nothing_held_out_is_trained_in_another_guise(tmp_path: Path, tokenizer) -> None:
    """Pieces of one long conversation, and one conversation under two system prompts, are on one side.

    Planted: sides drawn by the encoded piece -> both kinds are on both sides, fails.
    """
    chats = [
        {"messages": [turn for k in range(6) for turn in exchange(f"word{i} {k}", f"word{i} " + "and so on " * 4)]}
        for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    sources = [SourceSettings(tmp_path / "chats.jsonl", system=system) for system in ("", "Be brief.")]
    options = replace(BEST_FIT, long="split", valid=0.5)
    facts = prepare(sources, tmp_path / "rows", tokenizer, options)
    assert [each["split"] for each in facts["sources"]] == [40, 40]
    held = {number for _, _, number in documents(tmp_path / "rows/valid", tokenizer)}
    trained = {number for _, _, number in documents(tmp_path / "rows", tokenizer)}
    assert facts["train"]["documents"] + facts["valid"]["documents"] > 5 * 40
    assert len(held | trained) == 40
    assert not held & trained
    assert 8 < len(held) < 32


def exchange(asked: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


@pytest.mark.parametrize(
    ("packing", "long", "counts", "chats"),
    [
        ("concatenate", None, {}, 4),
        ("concatenate", "truncate", {"truncated": 1, "dropped": 1, "split": 1}, 3),
        ("best-fit", None, {"truncated": 1, "dropped": 1, "split": 1}, 3),
        ("best-fit", "split", {"split": 2, "dropped": 1, "dropped_exchanges": 1}, 6),
        ("best-fit", "drop", {"dropped": 2, "split": 1}, 2),
    ],
)
def test_long_conversations_are_counted(
    tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str], packing, long, counts: dict[str, int], chats: int
) -> None:
    """Two short ones and a repetition; one of too many turns, one of a too long answer; a long text."""
    words = next(n for n in range(100) if len(tokenizer.encode("so " * n)) > 36)  # two such answers fill no row
    long_turns = [turn for k in range(4) for turn in exchange(f"ask {k}", "so " * words)]
    records = [{"messages": exchange("ask", f"say {k}")} for k in (0, 1, 1)]
    records += [{"messages": long_turns}, {"messages": exchange("tell", "on " * 200)}, {"text": "la " * 80}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = replace(BEST_FIT, packing=packing, long=long)
    facts = prepare([SourceSettings(tmp_path / "a.jsonl")], tmp_path / "rows", tokenizer, options)
    (source,) = facts["sources"]
    known = ("truncated", "split", "dropped", "dropped_exchanges")
    assert {key: source[key] for key in known if key in source} == counts
    assert (source["conversations"], source["texts"], source["duplicates"]) == (5, 1, 1)
    # Pieces of a text overlap by a token, so that each is a label once.
    text = 2 + len(tokenizer.encode("la " * 80))
    assert facts["train"]["documents"] == chats + (
        1 if long is None and packing == "concatenate" else -(-(text - 1) // 63)
    )
    report(facts, tmp_path / "rows")
    said = capsys.readouterr().out.splitlines()[0]
    for key, count in {**counts, "duplicates": 1}.items():
        assert f"{count} {key.replace('_', ' ')}" in said


def test_epochs_weights_and_repetitions(tmp_path: Path, tokenizer) -> None:
    write_pairs(tmp_path / "a.jsonl", ["ab", "cd", "ab"])
    write_pairs(tmp_path / "b.jsonl", [f"x{i}" for i in range(10)])
    (tmp_path / "recipe.yaml").write_text("sources: [{path: a.jsonl, epochs: 2}, {path: b.jsonl, epochs: 1.5}]")
    facts = prepare(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "rows", tokenizer, BEST_FIT)
    seen = Counter((file, number) for _, file, number in documents(tmp_path / "rows", tokenizer))
    assert facts["sources"][0]["duplicates"] == 1
    assert [seen[("a.jsonl", i)] for i in range(3)] == [2, 2, 0]
    assert sorted(seen[("b.jsonl", i)] for i in range(10)) == [1] * 5 + [2] * 5
    assert parse_source("a.jsonl@2.5") == SourceSettings(Path("a.jsonl"), epochs=2.5)
    assert parse_source("a@b.jsonl") == SourceSettings(Path("a@b.jsonl"))

    (tmp_path / "recipe.yaml").write_text("sources: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]")
    facts = prepare(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "rows", tokenizer, BEST_FIT)
    tokens = [each["tokens"] * each["epochs"] for each in facts["sources"]]
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)
    assert facts["sources"][1]["epochs"] == 1.0


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("sources: []", "a list of entries with a path"),
        ("sources: [{path: a, size: 3}]", r"sources\[0\]: an entry has a path"),
        ("sources: [{path: a, epochs: 0}]", r"sources\[0\]: epochs must be a number above 0, not 0"),
        ("sources: [{path: a, epochs: 1, weight: 1}]", "has epochs and weight"),
        ("sources: [{path: a, weight: 1}, {path: b}]", r"sources\[1\] has no weight, others have"),
        ("sources: [", "is not YAML"),
        ("sources: [{path: a, text: 1}]", r"sources\[0\]: text must be text"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_told(tmp_path: Path, recipe: str, says: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(InputError, match=says):
        read_recipe(tmp_path / "recipe.yaml")


def test_shipped_recipes(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CrystalChat's shares, from files of their sets' names; whatever their sizes, the mixture has the card's."""
    shares = {source.path.name: source.weight for source in read_recipe("crystalchat", tmp_path)}
    assert sum(shares.values()) == pytest.approx(1102.52, abs=0.03)
    names = [f"word{i}" for i in range(40)]
    for number, (name, source) in enumerate((s.path.name, s) for s in read_recipe("crystalchat", tmp_path)):
        if source.text == "markdown":
            records = [{"topic": name, "markdown": f"# {name} {word}\n" + "la " * 200} for word in names]
        elif name.endswith(".json"):
            records = [{"instruction": f"{name} {word}", "input": "", "output": word} for word in names[:5]]
        else:
            turns = [{"from": "human", "value": f"{name} {number}"}, {"from": "gpt", "value": "ok"}]
            records = [{"conversations": [{**turns[0], "value": f"{name} {word}"}, turns[1]]} for word in names[:3]]
        path = tmp_path / name / "data.json" if "." not in name else tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records))
    options = ["--tokenizer", str(tokenizer_file), "--max-seq-length", "64", "--system", ""]
    arguments = ["finetune", "prepare", "--recipe", "crystalchat", "--out", str(tmp_path / "rows"), *options]
    with pytest.raises(SystemExit) as status:
        main([*arguments, "--root", str(tmp_path)])
    assert not status.value.code
    facts = json.loads((tmp_path / "rows/prepare.json").read_text())
    sizes = {Path(each["path"]).name: each["tokens"] * each["epochs"] for each in facts["sources"]}
    assert {each["texts"] for each in facts["sources"][-2:]} == {40}
    total = sum(sizes.values())
    for name, share in shares.items():
        assert sizes[name] / total == pytest.approx(share / 1102.5, rel=2e-3), name

    (tmp_path / "mix.yaml").write_text("sources: [{path: rosetta_alpaca.json, epochs: 2}]")
    with pytest.raises(SystemExit) as status:
        main(["finetune", "prepare", str(tmp_path / "mix.yaml"), "--out", str(tmp_path / "rows"), *options])
    assert not status.value.code
    assert json.loads((tmp_path / "rows/prepare.json").read_text())["train"]["documents"] == 10

    for name, says in (
        ("code_alpaca", "code_alpaca_2k.json: no such file or folder"),
        ("x", "or one of code_alpaca, crystalchat"),
    ):
        with pytest.raises(SystemExit) as status:
            main(
                [
                    "finetune",
                    "prepare",
                    "--recipe",
                    name,
                    "--out",
                    str(tmp_path / "o"),
                    *options,
                    "--root",
                    str(tmp_path),
                ]
            )
        assert status.value.code == 2
        assert says in capsys.readouterr().err


def test_processed_rows_and_texts_are_mixed_in(tmp_path: Path, tokenizer) -> None:
    ids = np.arange(300, 300 + LENGTH + 1)
    row = {"token_ids": ids[:-1].tolist(), "loss_mask": [1] * LENGTH, "label_ids": ids[1:].tolist()}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"text": "plain words"}))
    write_pairs(tmp_path / "in/sub.jsonl", ["ab"])
    for packing in ("concatenate", "best-fit"):
        options = PrepareOptions(max_seq_length=LENGTH, packing=packing, system="")
        prepare([SourceSettings(tmp_path / "in")], tmp_path / "rows", tokenizer, options)
        rows = [planes for planes, _ in rows_of(tmp_path / "rows")]
        assert any(np.array_equal(planes, [row["token_ids"], row["loss_mask"], row["label_ids"]]) for planes in rows)
        assert len(rows) == 2
        mixed = next(planes for planes in rows if planes[0, 0] == tokenizer.bos_id)
        assert mixed[1, : len(tokenizer.encode("plain words")) + 1].all()
    with pytest.raises(
        InputError, match=r"rows\.jsonl:record 1: a processed row of 64 tokens among rows of 32: .*-length 64"
    ):
        prepare([SourceSettings(tmp_path / "in")], tmp_path / "rows", tokenizer, PrepareOptions(max_seq_length=32))


def test_processed_rows_are_seen_as_often_as_their_source(tmp_path: Path, tokenizer) -> None:
    """By epochs and by weight. Planted: each row once, whatever its source's epochs -> fails."""
    ids = np.arange(300, 300 + 10 * LENGTH + 1)
    rows = [ids[at : at + LENGTH + 1] for at in range(0, 10 * LENGTH, LENGTH)]
    keys = ("token_ids", "loss_mask", "label_ids")
    lines = [dict(zip(keys, (r[:-1].tolist(), [1] * LENGTH, r[1:].tolist()), strict=True)) for r in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = write_pairs(tmp_path / "pairs.jsonl", [f"w{i}" for i in range(200)])
    for settings, times in (({"epochs": 2.5}, 25), ({"weight": 1.0}, None)):
        sources = [
            SourceSettings(tmp_path / "rows.jsonl", **settings),
            SourceSettings(pairs, weight=settings.get("weight")),
        ]
        facts = prepare(sources, tmp_path / "out", tokenizer, BEST_FIT)
        seen = Counter(
            int(planes[0, 0]) for planes, spans in rows_of(tmp_path / "out") if spans[0].path.endswith("rows.jsonl")
        )
        assert set(seen) == {int(row[0]) for row in rows}
        if times:
            assert seen.total() == times
        else:
            tokens = [each["tokens"] * each["epochs"] for each in facts["sources"]]
            assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)
            assert abs(seen.total() - tokens[0] / LENGTH) < 1


def test_refusals_leave_nothing_and_take_nothing(tmp_path: Path, tokenizer) -> None:
    good = SourceSettings(write_pairs(tmp_path / "a.jsonl", ["ab"]))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds other files than prepared rows"):
        prepare([good], kept, tokenizer, BEST_FIT)
    assert [path.name for path in kept.iterdir()] == ["thesis.tex"]
    context = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}
    (tmp_path / "none.jsonl").write_text(json.dumps(context))
    with pytest.raises(InputError, match="no assistant token to train on in the whole data"):
        prepare([SourceSettings(tmp_path / "none.jsonl")], tmp_path / "out", tokenizer, BEST_FIT)
    cut = PrepareOptions(max_seq_length=LENGTH, packing="best-fit", long="cut")
    with pytest.raises(InputError, match="best-fit cuts no conversation"):
        prepare([good], tmp_path / "out", tokenizer, cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "kept", "none.jsonl"]


@pytest.mark.parametrize(("owner", "method"), [(ExampleStore, "append"), (SequenceWriter, "write")])
def test_a_full_disk_is_one_line(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    """While tokens are stored, and while rows are written; nothing is left."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, method, fail)
    source = SourceSettings(write_pairs(tmp_path / "a.jsonl", ["ab"]))
    with pytest.raises(InputError, match=r"rows: cannot be written \(No space left on device\): free some space"):
        prepare([source], tmp_path / "rows", tokenizer, BEST_FIT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_skip_lists_what_was_left_out(tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pairs(tmp_path / "a.jsonl", ["ab"])
    source.write_text(source.read_text() + '\n{"prompt": "x"}\n{oops\n')
    arguments = [
        "finetune",
        "prepare",
        str(source),
        "--out",
        str(tmp_path / "rows"),
        "--tokenizer",
        str(tokenizer_file),
    ]
    with pytest.raises(SystemExit) as status:
        main([*arguments, "--on-error", "skip", "--max-seq-length", "64"])
    assert not status.value.code
    rejects = [json.loads(line) for line in (tmp_path / "rows/rejects.jsonl").read_text().splitlines()]
    assert [(Path(r["file"]).name, r["place"]) for r in rejects] == [("a.jsonl", "2"), ("a.jsonl", "3")]
    assert "2 records left out" in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        main([*arguments, "--recipe", "r.yaml"])
    assert status.value.code == 2


def test_masks_of_the_options(tmp_path: Path, tokenizer) -> None:
    """All text trains every label of a conversation but the last token's, which has none."""
    turns = [("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    shares = {}
    for train in ("assistant", "last", "all"):
        options = PrepareOptions(
            max_seq_length=LENGTH, packing="best-fit", system="", chat_format=ChatFormat(train=train)
        )
        facts = prepare([SourceSettings(tmp_path / "a.jsonl")], tmp_path / "rows", tokenizer, options)
        shares[train] = facts["train"]["trained_tokens"]
    one, two = len(tokenizer.encode("one")), len(tokenizer.encode("two"))
    assert shares == {"assistant": one + two + 1, "last": two + 1, "all": facts["train"]["tokens"] - 1}


def test_html_shows_what_is_trained(tmp_path: Path, tokenizer) -> None:
    """Every trained token is inside a coloured span, every other outside; text is escaped; documents are parted."""
    write_pairs(tmp_path / "a.jsonl", ["<b>&", "two"])
    prepare([SourceSettings(tmp_path / "a.jsonl")], tmp_path / "rows", tokenizer, BEST_FIT)
    write_html(tmp_path / "rows", tokenizer, tmp_path / "page.html", start=0, count=5)
    page = (tmp_path / "page.html").read_text()
    assert '<span class="trained">&lt;b&gt;&amp; .</span><span class="trained control">&lt;/s&gt;</span>' in page
    assert "<b>&" not in page
    assert page.count("<hr>") == 1
    assert "<small>a.jsonl #1</small>" in page
    assert page.index("<hr>") < page.index("<small>a.jsonl #2</small>")
    with pytest.raises(InputError, match="has no row 7"):
        write_html(tmp_path / "rows", tokenizer, tmp_path / "other.html", start=7, count=1)
    assert not (tmp_path / "other.html").exists()
    from rich.console import Console

    console = Console(record=True, width=100, color_system=None)
    show(tmp_path / "rows", tokenizer, console, start=0, count=1)
    said = console.export_text()
    padding = int((rows_of(tmp_path / "rows")[0][0][0] == tokenizer.eos_id).sum()) - 2
    assert f"⟦two .⟧⟦</s>⟧ [{padding} x </s> fill the row]" in said
    assert "-- a.jsonl #1\n<s>" in said
    assert "-- a.jsonl #2\n<s>" in said


def test_every_token_of_a_row_is_shown(tmp_path: Path, tokenizer) -> None:
    """But for the filling, and a whole document's last label, which stands for none; in rows of both kinds, whatever is
    trained. Planted: the token that begins a document left out -> fails."""
    turns = [("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    records = [{"messages": [{"role": r, "content": f"{c} {k}"} for r, c in turns]} for k in range(9)]
    records[0]["messages"][-1]["weight"] = 0  # its end is not trained either
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    for packing in ("concatenate", "best-fit"):
        for train in ("assistant", "all"):
            options = replace(BEST_FIT, packing=packing, chat_format=ChatFormat(train=train))
            prepare([SourceSettings(tmp_path / "a.jsonl")], tmp_path / "rows", tokenizer, options)
            for planes, spans in rows_of(tmp_path / "rows"):
                found = list(runs(planes, tokenizer))
                text = "".join(run.text for run in found).split(" [")[0]
                whole = tokenizer.decode([*planes[0].tolist(), int(planes[2, -1])])
                whole = whole.rstrip("</s>") + "</s>" if whole.endswith("</s></s>") else whole
                assert text.replace(" ", "") == whole.replace(" ", "")
                assert sum(run.begins for run in found) == len(spans) - 1
                assert sum(run.apart for run in found) == (len(spans) - 1 if packing == "best-fit" else 0)


def test_code_alpaca_is_packed_tight(shared: Path, tmp_path: Path) -> None:
    from data_prep.tokenizer import load_tokenizer

    published = load_tokenizer(shared / "data/crystalcoder_tokenizer.json")
    options = PrepareOptions(packing="best-fit")
    facts = prepare([SourceSettings(shared / "data/code_alpaca_2k.json")], tmp_path / "rows", published, options)
    assert facts["sources"][0]["conversations"] == 2017
    assert facts["train"]["fill"] > 0.97
