"""`crystalcoder serve`: transformers' server answers as `crystalcoder chat` does; vLLM's command and arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel
from CrystalCoder.build_tokenizer import build_tokenizer
from data_prep.errors import InputError
from finetune.templates import CHATML, TEMPLATE_FILE
from support.network import free_port
from support.sentencepiece_model import train_sentencepiece
from tools.chat import answer
from tools.generate import Sampling
from tools.hf_checkpoint import load_checkpoint
from tools.serve import NEEDED, prepare_model, start_server, vllm_command
from tools.serve import main as serve

CONTEXT = 64
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "name"}]


def need_server() -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason="the packages of crystalcoder[serve] are not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a context of 64 that writes plain words."""
    folder = tmp_path_factory.mktemp("serve") / "small"
    torch.manual_seed(1)
    sizes = {"n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 64, "rotary_dim": 4}
    config = CrystalCoderConfig(vocab_size=722, initializer_range=0.3, tie_word_embeddings=False, **sizes)
    model = CrystalCoderLMHeadModel(config)
    with torch.no_grad():  # no bytes and no control tokens: their logits are 0
        model.lm_head.weight[:259] = 0
        model.lm_head.weight[700:] = 0
    model.save_pretrained(folder)
    build_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"), folder)
    return folder


def get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://localhost:{port}{path}", timeout=60) as reply:
        return json.loads(reply.read())


def ask(port: int, **body: Any) -> tuple[int, str]:
    """Status and text of /v1/chat/completions."""
    data = json.dumps({"model": "small", "messages": ASKED, "temperature": 0, "max_tokens": 8, **body}).encode()
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def said(reply: tuple[int, str]) -> str:
    assert reply[0] == 200, reply
    return str(json.loads(reply[1])["choices"][0]["message"]["content"])


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            get(port, "/health")
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Iterator[int]:
    """Where transformers' server answers for the checkpoint, from a thread of this process."""
    need_server()
    port = free_port()
    model, tokenizer = load_checkpoint(checkpoint)
    prepare_model(model, tokenizer, checkpoint)
    server = start_server(model, tokenizer, "small", "localhost", port, background=True)
    wait_for(port)
    yield port
    server.kill_server()


def test_it_answers_as_chat_does(port: int, checkpoint: Path) -> None:
    expected = answer(*load_checkpoint(checkpoint), ASKED, Sampling(max_new_tokens=8))
    assert len(set(expected)) > 8
    assert said(ask(port)) == expected
    assert [model["id"] for model in get(port, "/v1/models")["data"]] == ["small"]

    status, stream = ask(port, stream=True)
    assert status == 200
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert len(chunks) > 4
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


def test_requests_sample_by_default_and_never_leave_the_context(port: int) -> None:
    answers = {said(ask(port, temperature=None, seed=seed)) for seed in range(4)}
    assert len(answers) > 1
    assert said(ask(port, temperature=1, seed=3)) == said(ask(port, temperature=1, seed=3))
    usage = json.loads(ask(port, max_tokens=1000)[1])["usage"]
    assert usage["total_tokens"] == CONTEXT
    status, why = ask(port, messages=[{"role": "user", "content": "name " * CONTEXT}])
    assert status == 400
    assert "the context 64: shorten it" in why
    assert ask(port, model="another")[0] == 400


def test_another_template_is_asked_in(checkpoint: Path, tmp_path: Path) -> None:
    need_server()
    folder = tmp_path / "chatml"
    shutil.copytree(checkpoint, folder)
    (folder / TEMPLATE_FILE).write_text(CHATML.to_yaml())
    model, tokenizer = load_checkpoint(folder)
    prepare_model(model, tokenizer, folder)
    rendered = tokenizer.apply_chat_template(ASKED[1:], add_generation_prompt=True, tokenize=False)
    assert rendered == "<s><|im_start|>user\nname<|im_end|>\n<|im_start|>assistant\n"
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<|im_start|>"])
    assert model.generation_config.eos_token_id == ends
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"no chat_template.jinja for vLLM"):
        vllm_command("vllm", folder, "small", "localhost", 8000, "auto")


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(checkpoint: Path, repo_root: Path) -> None:
    need_server()
    port = free_port()
    command = [sys.executable, "-m", "tools.cli", "serve", str(checkpoint), "--port", str(port)]
    server = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(port)
        assert said(ask(port)) == answer(*load_checkpoint(checkpoint), ASKED, Sampling(max_new_tokens=8))
        again = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
        assert again.returncode == 2
        assert f"cannot listen at localhost:{port}" in again.stderr
    finally:
        server.send_signal(signal.SIGINT)
        out, _ = server.communicate(timeout=60)
    assert f"serving small at http://localhost:{port}/v1" in out


def test_vllm_gets_the_directory_and_what_else_is_said(checkpoint: Path, tmp_path: Path, repo_root: Path) -> None:
    """Where a `vllm` is on PATH, `serve` becomes it, with the arguments of its own command line."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    port = free_port()
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "serve", str(checkpoint), "--port", str(port), "--max-num-seqs", "4"],
        cwd=repo_root,
        env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        *("serve", str(checkpoint), "--trust-remote-code", "--served-model-name", "small"),
        *("--host", "localhost", "--port", str(port), "--max-num-seqs", "4"),
    ]
    assert vllm_command("vllm", checkpoint, "x", "h", 1, "bfloat16")[-2:] == ["--dtype", "bfloat16"]


def test_as_vllm_runs_it(checkpoint: Path) -> None:
    """vLLM's transformers backend: the bare decoder with an attention of vLLM's, no mask and no cache, positions given,
    then its own head, whose scale it takes from the configuration's `logit_scale`."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **others: Any) -> Any:
        assert others["attention_instances"] == "theirs"
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3]), None

    AttentionInterface.register("vllm-like", attention)
    model, _ = load_checkpoint(checkpoint)
    ids = torch.arange(300, 340)[None]
    with torch.no_grad():
        expected = model(ids).logits
        model.config._attn_implementation = "vllm-like"
        positions = torch.arange(40)[None]
        hidden = model.transformer(
            input_ids=ids, position_ids=positions, use_cache=False, attention_instances="theirs", return_dict=False
        )[0]
        scale = model.config.get_text_config().logit_scale
    theirs = model.lm_head(hidden) * scale
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "vllm"], "vLLM is not installed"),
        (["--engine", "transformers", "--max-num-seqs", "4"], "unknown argument '--max-num-seqs'"),
        (["--engine", "transformers", "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:8000"),
    ],
)
def test_what_cannot_be_is_told(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.setattr("tools.serve.find_spec", lambda package: package)
    monkeypatch.setattr("tools.serve.shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit) as stopped:
        serve([str(checkpoint), *arguments])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_missing_packages_are_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.serve.find_spec", lambda package: None if package == "uvicorn" else package)
    with pytest.raises(SystemExit):
        serve([str(checkpoint), "--engine", "transformers"])
    told = capsys.readouterr().err
    assert told == (
        "error: serving needs uvicorn: install them with pip install 'crystalcoder[serve]', or install vllm\n"
    )
