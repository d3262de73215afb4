"""`convert inspect` and `convert diff`: what they say of checkpoints in every format, and their exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.crystalcoder.checkpoint.convert import convert
from support.checkpoints import distinct_weights, save_hf
from support.reference_model import TINY
from tools import convert as command

ODD = replace(TINY, num_attention_heads=8, ffn_hidden_size=170, vocab_size=250)
GATE = "transformer.h.2.mlp.c_fc2.weight"


def _said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output, error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


@pytest.fixture
def every_format(tmp_path: Path) -> dict[str, Path]:
    """The same weights in each format, at layouts that pad the FFN and the vocabulary."""
    hf = save_hf(tmp_path / "hf", distinct_weights(ODD), ODD)
    layouts: dict[str, dict[str, Any]] = {
        "torch": {"tensor_parallel": 4, "pipeline_parallel": 2, "virtual_pipeline": 2},
        "torch_dist": {"tensor_parallel": 8},
        "legacy": {"tensor_parallel": 2, "stage_layers": (1, 3)},
        "safetensors": {},
    }
    for name, layout in layouts.items():
        format_: Any = "hf" if name == "safetensors" else name
        convert(hf, tmp_path / name, format=format_, verify=False, **layout)
    return {"hf": hf, **{name: tmp_path / name for name in layouts}}


def test_inspect_tells_what_a_checkpoint_is(every_format: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    layouts = {"torch": "TP4 PP2 VPP2", "torch_dist": "TP8 PP1", "legacy": "TP2 PP2 (1+3 layers)"}
    for name, path in every_format.items():
        code, shown, _ = _said(capsys, "inspect", path)
        assert code == 0
        facts = {line[:26].strip(): line[26:].strip() for line in shown.split("\n\n")[0].splitlines()}
        assert facts["format"] == ("hf" if name == "safetensors" else name)
        assert facts["parameters"] == f"{ODD.num_parameters:,}"
        assert facts["dtype"] == "float32"
        assert facts["mup width_scale"] == str(ODD.mup.width_scale)
        assert facts.get("written at") == layouts.get(name)
        assert facts.get("iteration") == ("1 (converted)" if name in layouts else None)
        assert facts["ffn_hidden_size"].startswith("170")
        assert ("(padded to 172)" in facts["ffn_hidden_size"]) == (name == "torch")
        tensors = [line.split(None, 1) for line in shown.split("\n\n")[1].splitlines()]
        expected = {key: f"{list(x.shape)} float32" for key, x in distinct_weights(ODD).items()}
        assert {key: " ".join(rest.replace(", ", ",").split()).replace(",", ", ") for key, rest in tensors} == expected
        code, short, _ = _said(capsys, "inspect", path, "--no-tensors")
        assert "transformer.wte" not in short


def test_the_same_weights_in_every_format_are_equal(
    every_format: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = list(every_format.values())
    for first, second in zip(paths, [*paths[1:], paths[0]], strict=True):
        code, shown, error = _said(capsys, "diff", first, second)
        assert (code, error) == (0, "")
        assert shown == f"equal, bit for bit: 59 tensors, {ODD.num_parameters:,} parameters\n"


def test_what_differs_is_named(
    tmp_path: Path, every_format: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = distinct_weights(ODD)
    weights[GATE][3, 5] += 0.5
    weights[GATE][0, 0] = float("nan")
    weights["transformer.h.0.ln_1.bias"] = weights["transformer.h.0.ln_1.bias"].bfloat16()
    weights["transformer.h.1.ln_1.bias"] = weights["transformer.h.1.ln_1.bias"].bfloat16().float()
    other = save_hf(tmp_path / "other", weights, ODD, mup_output_alpha=3.0)
    for name in ("torch", "torch_dist"):
        code, shown, _ = _said(capsys, "diff", every_format[name], other)
        assert code == 1
        lines = shown.splitlines()
        assert lines[0] == "configuration: mup_output_alpha: 2.22, 3.0"
        assert lines[1].startswith("transformer.h.0.ln_1.bias: float32, bfloat16, ")
        assert lines[1].endswith("(the rounding of the dtype)")
        assert lines[2].startswith("transformer.h.1.ln_1.bias: ")
        assert "rounding" not in lines[2]
        assert lines[3] == f"{GATE}: 2 of 10,880 values differ, at most by 0.5, 1 NaN or infinite"
        assert lines[4] == "different: 4 differences; 56 of 59 tensors are equal"


def test_other_sizes_and_tensors(
    tmp_path: Path, every_format: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(ODD, num_layers=3, ffn_hidden_size=160)
    untied = replace(small, tie_word_embeddings=False)
    for number, config in enumerate((small, untied)):
        save_hf(tmp_path / f"{number}", distinct_weights(config), config)
    code, shown, _ = _said(capsys, "diff", every_format["torch"], tmp_path / "0")
    assert code == 1
    assert "configuration: n_layer: 4, 3" in shown
    assert "transformer.h.0.mlp.c_fc.weight: shape [64, 170], [64, 160]" in shown
    assert "transformer.h.3.ln_1.weight: not in the second checkpoint" in shown
    code, shown, _ = _said(capsys, "diff", tmp_path / "0", tmp_path / "1")
    assert "lm_head.weight: not in the first checkpoint" in shown
    assert shown.splitlines()[-1] == "different: 2 differences; 45 of 45 tensors are equal"


def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, every_format: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("diff", every_format["hf"], tmp_path / "no"), ("inspect", tmp_path / "no")):
        code, shown, error = _said(capsys, *arguments)
        assert (code, shown) == (2, "")
        assert error.endswith("no: no such directory: give the directory of a checkpoint\n")
    (every_format["hf"] / "pytorch_model-00002-of-00003.bin").unlink()
    code, _, error = _said(capsys, "diff", every_format["torch"], every_format["hf"])
    assert code == 2
    assert "pytorch_model-00002-of-00003.bin: no such file" in error


def test_legacy_checkpoint_of_the_reference(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds the fp32 checkpoint rounded to fp16, which is what diff says."""
    fixtures = shared / "fixtures"
    code, shown, _ = _said(capsys, "diff", fixtures / "hf_tiny", fixtures / "megatron_legacy_tiny_tp2_pp2")
    assert code == 1
    lines = shown.splitlines()
    assert len(lines) == 60
    assert all("float32, float16" in line and "rounding" in line for line in lines[:-1])
    convert(fixtures / "hf_tiny", tmp_path / "half", format="torch_dist", dtype=torch.float16)
    code, shown, _ = _said(capsys, "diff", tmp_path / "half", fixtures / "megatron_legacy_tiny_tp2_pp2")
    assert (code, shown) == (0, "equal, bit for bit: 59 tensors, 4,895,152 parameters\n")
    code, shown, _ = _said(capsys, "inspect", fixtures / "megatron_legacy_tiny_tp2_pp2")
    assert "mup                       not recorded" in shown
    assert json.dumps([32032, 128]) in shown
