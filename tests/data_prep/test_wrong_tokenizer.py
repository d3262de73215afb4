"""A wrong tokenizer stops both doors before any work, in one line; so do ids that it does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from data_prep.commands import main as data
from data_prep.create_hdf5_dataset import main as lmdata
from data_prep.errors import InputError
from data_prep.tokenizer import load_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "one two"}\n{"text": \n')  # met only if work starts
    return tmp_path / "in"


def without_tokens(source: Path, target: Path, *names: str) -> Path:
    definition = json.loads(source.read_text())
    kept = [token for token in definition["added_tokens"] if token["content"] not in names]
    vocab = {piece: number for piece, number in definition["model"]["vocab"].items() if piece not in names}
    definition |= {"added_tokens": kept, "model": definition["model"] | {"vocab": vocab}}
    target.write_text(json.dumps(definition))
    return target


def write_all(folder: Path, good: Path) -> dict[str, str]:
    """File name -> what is said of it."""
    folder.mkdir()
    gpt2 = Backend(models.BPE())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel()
    gpt2.save(str(folder / "gpt2.json"))
    for name, content in (("empty.json", b""), ("text.json", b"hello"), ("other.json", b'{"a": 1}'),
                          ("list.json", b"[]"), ("null.json", b'{"model": null}'), ("bytes.json", b"\xff\xfe"),
                          ("text.model", b"hello"), ("cut.json", good.read_bytes()[:5000])):  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    without_tokens(good, folder / "no_end.json", "</s>")
    without_tokens(good, folder / "half_fim.json", "<|fim_middle|>", "<|fim_pad|>")
    return {
        "gpt2.json": "is not a tokenizer of the LLaMA kind",
        "empty.json": "is not a tokenizer.json",
        "text.json": "is not a tokenizer.json",
        "other.json": "is JSON, but no tokenizer.json",
        "list.json": "is JSON, but no tokenizer.json",
        "null.json": "is JSON, but no tokenizer.json",
        "bytes.json": "is not a tokenizer.json",
        "cut.json": "is not a tokenizer.json",
        "text.model": "is not a tokenizer.json or a SentencePiece .model",
        "folder": "holds no tokenizer.json",
        "absent.json": "no such tokenizer file",
        "no_end.json": "has no token </s>",
        "half_fim.json": "has FIM tokens, but no fim_middle, fim_pad",
    }


def test_it_stops_before_work_starts(corpus: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    """Planted: the FIM ids looked up in the workers alone -> the bad line is met first, fails."""
    for name, message in write_all(tmp_path / "bad", tokenizer_file).items():
        path, out = tmp_path / "bad" / name, tmp_path / "out"
        tokenize = ["tokenize", str(corpus), "--out", str(out), "--tokenizer", str(path), "--fim-rate", "0.5"]
        door = ["LMData", "--input_dir", str(corpus), "--output_dir", str(out), "--encoder_file", str(path)]
        with pytest.raises(InputError, match=message) as caught:
            data(tokenize)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        if name != "half_fim.json":  # there is no FIM behind that door
            with pytest.raises(InputError, match=message):
                lmdata(door)
        assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eos_id", "5"], "--eos_id 5: in .*tokenizer.json </s> is 2"),
        (["--pad_id", "700"], r"--pad_id 700: .*tokenizer.json has the ids 0 to \d+"),
        (["--pad_id", "-1"], "--pad_id -1: .*tokenizer.json has the ids"),
        (["--eos_id", "32000", "--reference-compat"], r"--eos_id 32000: .*tokenizer.json has the ids 0 to \d+"),
        (["--eos_id", "2", "--pad_id", "-1", "--reference-compat"], r"--pad_id -1: .* has the ids 0 to \d+"),
        (["--eos_id", "2", "--encoder_file", "/nowhere.json", "--reference-compat"], "nowhere.json: is not a tokeni"),
    ],
)
def test_ids_that_it_does_not_have(
    corpus: Path, tmp_path: Path, tokenizer_file: Path, flags: list[str], message: str
) -> None:
    out = tmp_path / "out"
    door = ["LMData", "--input_dir", str(corpus), "--output_dir", str(out), "--encoder_file", str(tokenizer_file)]
    with pytest.raises(InputError, match=message):
        lmdata([*door, *flags])
    assert not out.exists()


def test_a_vocabulary_without_fim_gets_its_ids_at_the_end(tokenizer_file: Path, tmp_path: Path) -> None:
    names = [f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad")]
    tokenizer = load_tokenizer(without_tokens(tokenizer_file, tmp_path / "plain.json", *names))
    fim, size = tokenizer.fim_ids, tokenizer.vocab_size
    assert (fim.prefix, fim.middle, fim.suffix, fim.pad) == (size, size + 1, size + 2, size + 3)
