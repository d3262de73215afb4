"""`crystalcoder generate` and `crystalcoder chat`: the text around the model, and clear words when there is none."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TextStreamer

from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel
from CrystalCoder.build_tokenizer import build_tokenizer
from data_prep.errors import InputError
from finetune.chat_format import DEFAULT_SYSTEM_PROMPT
from support.sentencepiece_model import train_sentencepiece
from tools import chat as chat_command
from tools import generate as generate_command
from tools.chat import answer
from tools.generate import Sampling, complete, infill
from tools.hf_checkpoint import SYSTEM_FILE, load_checkpoint

CONTEXT = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 730 ids with a context of 64, and a tokenizer of 722."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = CrystalCoderConfig(
        vocab_size=730,
        n_positions=CONTEXT,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_inner=64,
        rotary_dim=4,
        initializer_range=0.3,
    )
    CrystalCoderLMHeadModel(config).save_pretrained(folder)
    build_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load_checkpoint(checkpoint)


class Scripted:
    """In place of a model: writes the pieces it is told to, and remembers what it was asked."""

    config = SimpleNamespace(n_positions=CONTEXT)
    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, *pieces: str) -> None:
        self.ids = tokenizer.convert_tokens_to_ids(list(pieces))

    def generate(self, prompt: torch.Tensor, generation_config: Any, **others: Any) -> torch.Tensor:
        self.asked, self.settings = prompt[0].tolist(), generation_config
        return torch.cat([prompt, torch.tensor([self.ids])], dim=1)


def test_completion_is_the_greedy_continuation(loaded: tuple[Any, Any]) -> None:
    """The likeliest token, again and again, after <s> and the prompt."""
    model, tokenizer = loaded
    start = ids = [tokenizer.bos_token_id, *tokenizer.encode_text("def f(x):")]
    for _ in range(10):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    assert tokenizer.eos_token_id not in ids
    text = complete(model, tokenizer, "def f(x):", Sampling(max_new_tokens=10))
    assert "def f(x):" + text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) - len(start) == 10


def test_a_tokenizer_file_alone_is_enough(checkpoint: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    messages, sampling = [{"role": "user", "content": "def f"}], Sampling(max_new_tokens=8)
    assert answer(*load_checkpoint(folder), messages, sampling) == answer(*loaded, messages, sampling)


@pytest.mark.parametrize("end", ["</s>", "▁return"])
def test_a_completion_keeps_its_first_space_and_loses_its_end(loaded: tuple[Any, Any], end: str) -> None:
    _, tokenizer = loaded
    model = Scripted(tokenizer, "▁return", end)
    text = complete(model, tokenizer, "def f(x): a </s>")
    assert text == " return" + (" return" if end != "</s>" else "")
    assert model.asked.count(tokenizer.eos_token_id) == 0  # the one that the prompt spells out is text
    assert model.settings.do_sample is False


def test_infilling_in_both_formats(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    ours, published = Scripted(tokenizer, "▁re", "turn", "</s>"), Scripted(tokenizer, "▁re", "turn", "<|fim_prefix|>")
    assert infill(ours, tokenizer, "def f():", "()") == " return"
    assert infill(published, tokenizer, "def f():", "()", published=True) == "return"
    assert infill(ours, tokenizer, "", "()") == "return"
    assert ours.asked == tokenizer.encode_infill("", "()")
    assert published.asked == tokenizer.encode_infill("def f():", "()", published=True)


def test_sampling_follows_its_seed(loaded: tuple[Any, Any]) -> None:
    def sample(**settings: Any) -> str:
        return complete(*loaded, "import", Sampling(max_new_tokens=20, **settings))

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    assert sample(temperature=1.0, top_p=1e-6, seed=1) == sample()


def test_the_context_is_never_left(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    model = Scripted(tokenizer)
    used = 1 + len(tokenizer.encode_text("x = 1"))
    complete(model, tokenizer, "x = 1", Sampling(max_new_tokens=1000))
    assert model.settings.max_new_tokens == CONTEXT - used
    with pytest.raises(InputError, match="context is 64: shorten it"):
        complete(model, tokenizer, "x = 1\n" * CONTEXT)


def test_an_answer(loaded: tuple[Any, Any]) -> None:
    """The conversation goes in as ids of the format; the answer ends at </s> or where a user turn would begin."""
    _, tokenizer = loaded
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "forge <|im_end|>"}]
    for end in ("</s>", "<|im_start|>"):
        model = Scripted(tokenizer, "▁def", "▁f", end)
        assert answer(model, tokenizer, messages) == "def f"
        assert model.asked == tokenizer.encode_chat(messages)


def test_streaming_writes_the_answer(loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = [{"role": "user", "content": "hello"}]
    text = answer(model, tokenizer, messages, Sampling(max_new_tokens=12), streamer)
    assert capsys.readouterr().out == text + "\n"


def run(command: Any, *arguments: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    assert stopped.value.code in (0, None), stopped.value.code


def test_the_generate_command(checkpoint: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(generate_command, checkpoint, "--prompt", "import", "--max-new-tokens", 6, "--dtype", "float32")
    assert capsys.readouterr().out == complete(*loaded, "import", Sampling(max_new_tokens=6)) + "\n"
    run(generate_command, checkpoint, "--prefix", "def f(", "--suffix", "):", "--max-new-tokens", 6)
    assert capsys.readouterr().out == infill(*loaded, "def f(", "):", Sampling(max_new_tokens=6)) + "\n"


def test_the_chat_command(
    checkpoint: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question; then two turns and a reset, after which the first answer comes again."""

    def expected(*contents: str) -> str:
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return answer(*loaded, turns, Sampling(max_new_tokens=6))

    first = expected("hello")
    run(chat_command, checkpoint, "--message", "hello", "--max-new-tokens", 6, "--system", "")
    assert capsys.readouterr().out == first + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n/reset\nhello\n\nnever read\n"))
    run(chat_command, checkpoint, "--max-new-tokens", 6, "--system", "")
    said = capsys.readouterr().out
    assert said == f"> {first}\n> {expected('hello', first, 'more')}\n> > {first}\n> "


def test_the_system_prompt_is_the_tuning_datas(
    checkpoint: Path, loaded: tuple[Any, Any], monkeypatch: Any, tmp_path: Path
) -> None:
    """Unless --system says otherwise: what a model was tuned with by default is what it is asked with."""
    model = Scripted(loaded[1], "</s>")
    monkeypatch.setattr(chat_command, "load_checkpoint", lambda *args, **kwargs: (model, loaded[1]))
    model.config = SimpleNamespace(n_positions=2048)
    for options, system in (((), DEFAULT_SYSTEM_PROMPT), (("--system", "S"), "S")):
        run(chat_command, checkpoint, "--message", "U", *options)
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "U"}]
        assert model.asked == loaded[1].encode_chat(turns)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for told in ("You add numbers.", ""):
        (tuned / SYSTEM_FILE).write_text(told)
        run(chat_command, tuned, "--message", "U")
        opening = [{"role": "system", "content": told}] if told else []
        assert model.asked == loaded[1].encode_chat([*opening, {"role": "user", "content": "U"}])


def test_a_turn_that_does_not_fit_is_told_and_dropped(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x = 1 " * CONTEXT + "\nhello\n"))
    run(chat_command, checkpoint, "--max-new-tokens", 2, "--system", "")
    captured = capsys.readouterr()
    assert captured.err.count("shorten it") == 1
    assert len(captured.out.split("> ")) == 4


def spoil_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def spoil_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def spoil_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, folder / "model.safetensors")


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def spoil_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 96}))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoil_nothing_there, "no such directory"),
        (spoil_config, "no config.json"),
        (spoil_kind, "is a gpt2 model"),
        (spoil_json, "config.json: cannot be read"),
        (spoil_weights, "holds no weights"),
        (spoil_bytes, "weights cannot be read"),
        (spoil_tensor, "lack 1 tensors, transformer.h.1.mlp.c_fc.bias"),
        (spoil_tokenizer, "no tokenizer.json"),
        (spoil_sizes, "weights cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [generate_command, chat_command])
def test_what_is_no_checkpoint_is_told_in_one_line(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: Any, spoil: Any, complaint: str
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    with pytest.raises(SystemExit) as stopped:
        command.main([str(folder), "--prompt" if command is generate_command else "--message", "x"])
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert complaint in lines[0]
    assert str(folder) in lines[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either --prompt"),
        (["--prompt", "x", "--suffix", "y"], "either --prompt"),
        (["--prompt", "x", "--published-fim"], "--published-fim"),
        (["--prompt", "x", "--device", "nowhere"], "device 'nowhere'"),
    ],
)
def test_contradictions_are_told(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate_command.main([str(checkpoint), *arguments])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
