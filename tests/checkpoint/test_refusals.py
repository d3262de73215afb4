"""Broken or unsuitable checkpoints: exit code 2, one line that names the culprit, nothing left behind."""

from __future__ import annotations

import json
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.crystalcoder.checkpoint.convert import convert
from support.checkpoints import distinct_weights, save_hf
from support.reference_model import TINY
from tools import convert as command

Weights = dict[str, Tensor]
GATE = "transformer.h.2.mlp.c_fc2.bias"


class Foreign:
    """A class that no checkpoint of weights needs."""


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """Run the command, which must fail as promised, and return its one line."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert sorted(folder.rglob("*")) == before
    return error


def _without(weights: Weights) -> None:
    del weights[GATE]


def _with_one_more(weights: Weights) -> None:
    weights["transformer.h.4.ln_1.weight"] = torch.ones(64)


def _misshapen(weights: Weights) -> None:
    weights[GATE] = torch.zeros(170)


def _with_nan(weights: Weights) -> None:
    weights[GATE][7] = float("nan")


def _untied_head(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, f"tensor {GATE} is missing"),
        (_with_one_more, "tensor transformer.h.4.ln_1.weight does not belong"),
        (_misshapen, f"tensor {GATE} has shape [170], but the configuration asks for [172]"),
        (_with_nan, f"tensor {GATE} has NaN"),
        (_untied_head, "lm_head.weight differs from transformer.wte.weight"),
    ],
)
@pytest.mark.parametrize("format_", ["torch", "torch_dist"])
def test_bad_tensors_of_a_hugging_face_checkpoint(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Weights], None],
    message: str,
    format_: str,
) -> None:
    weights = distinct_weights()
    change(weights)
    hf = save_hf(tmp_path / "hf", weights)
    arguments = ["--from", str(hf), "--to", str(tmp_path / "new/out"), "--format", format_]
    assert message in _refused(arguments, capsys, tmp_path)


def test_a_tensor_that_the_index_passes_over_is_not_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planted: only what the index lists is looked at, and the conversion succeeds without the tensor."""
    hf = save_hf(tmp_path / "hf", distinct_weights())
    _edit(sorted(hf.glob("*.bin"))[0], lambda content: content.update({"transformer.h.0.attn.rogue": torch.ones(3)}))
    message = _refused(["--from", str(hf), "--to", str(tmp_path / "out")], capsys, tmp_path)
    assert "tensor transformer.h.0.attn.rogue does not belong" in message


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """A sound TP2/PP2 checkpoint to break."""
    hf = save_hf(tmp_path / "hf", distinct_weights())
    convert(hf, tmp_path / "m", format="torch", tensor_parallel=2, pipeline_parallel=2, verify=False)
    return tmp_path / "m"


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("decoder.layers.1.mlp.linear_fc1.bias"), "linear_fc1.bias is missing"),
        (lambda c: c["model"].update(x=torch.ones(2)), "tensor x does not belong"),
        (lambda c: c["model"].update({"decoder.layers.0.mlp.linear_fc1.bias": torch.ones(9)}), "has shape [9]"),
        (lambda c: c["model"]["decoder.layers.0.mlp.linear_fc1.bias"][0].div_(0), "mlp.c_fc2.bias has NaN or inf"),
        (lambda c: c["model"]["output_layer.weight"].add_(1), "the embedding on the first pipeline stage"),
        (lambda c: c.update(model={"language_model": {}}), "does not hold the same kind of `model`"),
        (lambda c: c.update(spy=Foreign()), "refused to unpickle class test_refusals.Foreign"),
    ],
)
def test_bad_rank_file(
    tmp_path: Path,
    megatron: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pytest's import mode keeps test modules out of sys.modules, where pickle looks for them.
    monkeypatch.setitem(sys.modules, "test_refusals", sys.modules.get(__name__) or SimpleNamespace(Foreign=Foreign))
    monkeypatch.setattr(Foreign, "__module__", "test_refusals")
    _edit(megatron / "iter_0000001/mp_rank_01_001/model_optim_rng.pt", change)
    error = _refused(["--from", str(megatron), "--to", str(tmp_path / "out"), "--format", "hf"], capsys, tmp_path)
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: setattr(a, "swiglu", False), "args.swiglu is False"),
        (lambda a: delattr(a, "hidden_size"), "args has no `hidden_size`"),
        (lambda a: setattr(a, "num_layers", 3), "does not divide the 3 layers"),
        (lambda a: setattr(a, "use_mup", False), "does not record the muP constants"),
        (lambda a: setattr(a, "rotary_interleaved", False), "cannot express"),
    ],
)
def test_bad_args(
    tmp_path: Path,
    megatron: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Namespace], None],
    message: str,
) -> None:
    _edit(megatron / "iter_0000001/mp_rank_00_000/model_optim_rng.pt", lambda content: change(content["args"]))
    error = _refused(["--from", str(megatron), "--to", str(tmp_path / "out"), "--format", "hf"], capsys, tmp_path)
    assert message in error


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "break_it", "message"),
    [
        ("latest_checkpointed_iteration.txt", Path.unlink, "neither a Megatron nor a Hugging Face checkpoint"),
        ("latest_checkpointed_iteration.txt", lambda p: p.write_text("7"), "names iter_0000007, which is not there"),
        ("latest_checkpointed_iteration.txt", lambda p: p.write_text("soon"), "instead of an iteration number"),
        ("iter_0000001/mp_rank_01_000/model_optim_rng.pt", Path.unlink, "no such file"),
        ("iter_0000001/mp_rank_01_000/model_optim_rng.pt", _cut, "damaged or cut short"),
        ("iter_0000001/mp_rank_01_000/model_optim_rng.pt", lambda p: p.write_bytes(b""), "damaged or cut short"),
        ("iter_0000001/mp_rank_01_000/model_optim_rng.pt", lambda p: torch.save([1], p), "does not hold the same kind"),
    ],
)
def test_broken_megatron_directory(
    tmp_path: Path,
    megatron: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    break_it: Callable[[Path], Any],
    message: str,
) -> None:
    break_it(megatron / file)
    assert message in _refused(["--from", str(megatron), "--to", str(tmp_path / "out")], capsys, tmp_path)


@pytest.mark.parametrize(
    ("file", "break_it", "message"),
    [
        ("config.json", Path.unlink, "no such file, and no config.json"),
        ("config.json", lambda p: p.write_text("{"), "cannot be read as JSON"),
        ("config.json", lambda p: p.write_text('{"n_embd": 64}'), "key 'n_head' is missing"),
        ("pytorch_model-00002-of-00003.bin", Path.unlink, "no such file"),
        ("pytorch_model-00002-of-00003.bin", _cut, "damaged or cut short"),
        ("pytorch_model.bin.index.json", Path.unlink, "holds no weights"),
        ("pytorch_model.bin.index.json", lambda p: p.write_text("{}"), "holds no weight_map"),
    ],
)
def test_broken_hugging_face_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, break_it: Callable[[Path], Any], message: str
) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    break_it(hf / file)
    assert message in _refused(["--from", str(hf), "--to", str(tmp_path / "out")], capsys, tmp_path)


def test_broken_torch_dist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    folder = tmp_path / "m/iter_0000001"
    convert(hf, tmp_path / "m", format="torch_dist", verify=False)
    arguments = ["--from", str(tmp_path / "m"), "--to", str(tmp_path / "out")]

    data, metadata = folder / "__0_0.distcp", folder / ".metadata"
    whole = data.read_bytes()
    _cut(data)
    assert "cannot be read, __0_0.distcp is missing or damaged" in _refused(arguments, capsys, tmp_path)
    data.write_bytes(whole)

    whole = metadata.read_bytes()
    _cut(metadata)
    assert ".metadata: cannot be read" in _refused(arguments, capsys, tmp_path)
    metadata.write_bytes(pickle.dumps(_Evil()))
    assert "refused to unpickle class posix.system" in _refused(arguments, capsys, tmp_path)
    content = pickle.loads(whole)
    del content.state_dict_metadata["decoder.layers.mlp.linear_fc1.bias"]
    metadata.write_bytes(pickle.dumps(content))
    assert "tensor decoder.layers.mlp.linear_fc1.bias is missing" in _refused(arguments, capsys, tmp_path)


class _Evil:
    """Unpickling this with an ordinary unpickler would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch /tmp/should-not-exist",)


def test_layouts_targets_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights())
    odd = tmp_path / "odd"
    odd_config = replace(TINY, vocab_size=254, ffn_hidden_size=170)
    save_hf(odd, distinct_weights(odd_config), odd_config)
    out = tmp_path / "out"
    there = ["--from", str(hf), "--to", str(out)]
    # 4 is offered although it does not divide the vocabulary or the FFN: these are padded.
    assert "tensor parallel size 3 does not divide the attention heads (4): use one of 1, 2, 4" in _refused(
        ["--from", str(odd), *there[2:], "--tp", "3"], capsys, tmp_path
    )
    assert "pipeline parallel size 3 does not divide the 4 layers" in _refused([*there, "--pp", "3"], capsys, tmp_path)
    assert "has no layout" in _refused([*there, "--format", "hf", "--tp", "2"], capsys, tmp_path)
    assert "needs --from CHECKPOINT and --to" in _refused(["--from", str(hf)], capsys, tmp_path)
    assert "no such directory" in _refused(["--from", str(tmp_path / "no"), "--to", str(out)], capsys, tmp_path)
    assert "holds no config.json" in _refused([*there, "--hf-config", str(tmp_path)], capsys, tmp_path)
    out.mkdir()
    (out / "precious").write_text("1")
    assert "exists already" in _refused(there, capsys, tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main([*there, "--overwrite"])
    assert stop.value.code == 0
    assert not (out / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "odd", "out"]


def test_broken_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(save_hf(tmp_path / "x", distinct_weights()), tmp_path / "hf", format="hf", verify=False)
    arguments = ["--from", str(tmp_path / "hf"), "--to", str(tmp_path / "out")]
    file = tmp_path / "hf/model.safetensors"
    whole = file.read_bytes()
    for cut in (len(whole) - 4, 100, 0):
        file.write_bytes(whole[:cut])
        assert "damaged or cut short" in _refused(arguments, capsys, tmp_path)
    tensors = {name: x.to(torch.int8) for name, x in distinct_weights().items()}
    save_file(tensors, file)
    assert "tensor transformer.h.0.attn.c_attn.bias is stored as I8" in _refused(arguments, capsys, tmp_path)


def test_values_that_do_not_fit_the_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = distinct_weights()
    weights[GATE][3] = 1e5
    hf = save_hf(tmp_path / "hf", weights)
    arguments = ["--from", str(hf), "--to", str(tmp_path / "out"), "--dtype", "float16"]
    assert f"tensor {GATE} does not fit float16" in _refused(arguments, capsys, tmp_path)


def test_other_architectures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save_hf(tmp_path / "hf", distinct_weights(), activation_function="gelu")
    arguments = ["--from", str(hf), "--to", str(tmp_path / "out")]
    assert "activation_function is 'gelu'" in _refused(arguments, capsys, tmp_path)
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**values, "activation_function": "swiglu", "n_head": 5}))
    assert f"hidden size {TINY.hidden_size} is not divisible by 5" in _refused(arguments, capsys, tmp_path)
