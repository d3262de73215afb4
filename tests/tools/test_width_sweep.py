"""muP's tools: the same model at other widths, sizes that stay put, a best rate; the same at any layout."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.training.params import load_params
from support.distributed import run_on_ranks
from support.sequence_rows import write_h5
from tools.mutransfer import optimum

S, V = 32, 128
SMALL = [
    f"model.vocab_size={V}", f"train_input.vocab_size={V}", f"eval_input.vocab_size={V}", "model.num_hidden_layers=2",
    f"model.max_position_embeddings={S}", f"model.loss_weight={1 / S}",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences in which each token leaves the next a choice of two."""
    root = tmp_path_factory.mktemp("widths")
    generator = np.random.default_rng(0)
    successor = generator.integers(0, V, (V, 2))
    text = np.empty((200, S + 1), dtype=np.int32)
    text[:, 0] = generator.integers(0, V, 200)
    for t in range(S):
        text[:, t + 1] = successor[text[:, t], generator.integers(0, 2, 200)]
    rows = np.stack([text[:, :-1], np.ones_like(text[:, 1:]), text[:, 1:]], axis=1)
    for name in ("prose", "code"):
        write_h5(root / "data" / name / "x.h5", rows)
    return root


def test_a_width_follows_the_rules(repo_root: Path) -> None:
    """The 7B file carried to the base width and to its own; with muP and without. Planted: spread by m, not its root;
    rate left as it is: fail."""
    from megatron.crystalcoder.training.widths import at_width

    params = load_params(repo_root / "params/phase1/params.yaml")
    config = params.train_config()
    same, init = at_width(params, config, 4096, "mup")
    assert (same, init) == (config, params.init_settings())
    for parametrisation in ("mup", "sp"):
        base, init = at_width(params, config, 256, parametrisation)  # type: ignore[arg-type]
        assert base.model.mup.width_scale == base.optimizer.hidden_lr_scale == 1.0
        assert base.model.mup.output_scale == pytest.approx(2.22)
        assert (init.hidden.std, init.hidden.a, init.hidden.b) == pytest.approx((0.073, -0.146, 0.146))
        assert init.output.std == pytest.approx(0.073 / 8)
        assert init.embedding == params.init_settings().embedding
        assert (base.model.num_attention_heads, base.model.ffn_hidden_size) == (2, 682)
    wide, init = at_width(params, config, 1024, "sp")
    assert (wide.model.mup.output_scale, wide.optimizer.hidden_lr_scale) == (pytest.approx(2.22), 1.0)
    assert init.hidden.std == pytest.approx(0.073 / 2)
    with pytest.raises(InputError, match="width 200 is not a multiple of the head size 128"):
        at_width(params, config, 200, "mup")


def test_slopes_are_those_of_power_laws() -> None:
    from megatron.crystalcoder.training.coordinates import slopes

    assert slopes({w: [3.0, 5.0 * w**0.5, 0.0, 2.0 / w] for w in (64, 128, 512)}) == pytest.approx([0, 0.5, 0, -1])


def test_the_optimum_is_the_parabolas() -> None:
    """Exact for a parabola over log lr, between grid points; the edge where it lies there; past diverged runs."""
    lrs = [0.001, 0.002, 0.004, 0.008]
    losses = [(math.log2(lr) - math.log2(0.0031)) ** 2 + 1 for lr in lrs]
    assert optimum(lrs, losses) == pytest.approx(0.0031)
    assert optimum(lrs, [1.0, 2.0, 3.0, 4.0]) == 0.001
    assert optimum(lrs, [3.0, 2.0, math.inf, math.inf]) == 0.002


def sizes_at(params: Path, data_root: Path, tp: int, pp: int) -> dict[str, dict[int, dict[str, Any]]]:
    from megatron.crystalcoder.training import coordinates, widths
    from tools import coord_check, width_sweep

    top = width_sweep.parser("coord-check", "", widths="64,128,256", steps=3, batch_size=2)
    arguments = ["--params", str(params), "--data_root", str(data_root), "--out", "-", "--tp", str(tp), "--pp", str(pp)]
    values, config = width_sweep.read(top.parse_intermixed_args([*arguments, *SMALL]))
    data = widths.prepare(config)
    assert coord_check.FLAT == 0.05
    return {
        name: {
            width: coordinates.measure(values, config, name, width, data, steps=3, lr=3e-4, seed=1)
            for width in ((64, 128, 256) if tp == 1 else (64,))
        }
        for name in widths.PARAMETRISATIONS
    }


def test_sizes_stay_put_with_mup_alone_and_do_not_depend_on_the_layout(repo_root: Path, data_root: Path) -> None:
    """Changes of every layer over widths 64 to 256: |slope| below 0.25 with muP, above 0.6 without; and sizes at
    TP2/PP2 with sequence parallelism are those of one rank.

    Planted: sums instead of means over ranks; hidden lr left unscaled with muP (slope 0.82): each fails."""
    from megatron.crystalcoder.training.coordinates import slopes

    params = repo_root / "params/tiny/phase1.yaml"
    [alone] = run_on_ranks(1, sizes_at, params, data_root, 1, 1)
    ranks = run_on_ranks(4, sizes_at, params, data_root, 2, 2)
    for name, by_width in ranks[0].items():
        for module, sizes in by_width[64].items():
            expected = alone[name][64][module]
            np.testing.assert_allclose(sizes.activation, expected.activation, rtol=1e-4, err_msg=module)
            np.testing.assert_allclose(sizes.update, expected.update, rtol=1e-3, err_msg=module)
        assert set(by_width[64]) == set(alone[name][64])
    layers = [f"layer {number}{part}" for number in (1, 2) for part in ("", " attention", " MLP")]
    for module in layers:
        mup, sp = (slopes({w: one[module].update for w, one in alone[name].items()})[1:] for name in ("mup", "sp"))
        assert max(map(abs, mup)) < 0.25, module
        assert min(sp) > 0.6, module


@pytest.mark.slow
def test_activations_are_flat_with_mup_alone(repo_root: Path, data_root: Path, tmp_path: Path) -> None:
    """`coord-check` at widths 128 to 512, mean of three seeds: every |slope| of an activation below 0.05 with muP, as
    the command's exit code says too; without it the last layer's parts rise. Of all logits' mean size see docs/mup.md.
    """
    arguments = ["--params", "params/tiny/phase1.yaml", "--data_root", str(data_root), "--out", str(tmp_path), *SMALL]
    arguments += ["--widths", "128,256,512", "--seeds", "3", "--steps", "3"]
    checked = subprocess.run(
        [sys.executable, "-m", "tools.cli", "coord-check", *arguments], cwd=repo_root, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    slopes = json.loads((tmp_path / "coord-check.json").read_text())["slopes"]
    for module, steps in slopes["activation"]["mup"].items():
        assert module == "logits" or max(map(abs, steps)) < 0.05, module
    without = slopes["activation"]["sp"]
    assert min(without[module][-1] for module in ("layer 2 attention", "layer 2 MLP", "token loss")) > 0.1


@pytest.mark.slow
def test_the_commands(repo_root: Path, data_root: Path, tmp_path: Path) -> None:
    """Both write their numbers and plot; mutransfer's are finite and learnt. A wrong width is one line."""
    common = ["--params", "params/tiny/phase1.yaml", "--data_root", str(data_root), "--out", str(tmp_path), *SMALL]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", *arguments], cwd=repo_root, capture_output=True, text=True
        )

    swept = run("mutransfer", *common, "--widths", "64,128", "--steps", "20", "--lrs", "0.0001,0.003,0.01")
    assert swept.returncode == 0, swept.stderr
    result = json.loads((tmp_path / "mutransfer.json").read_text())
    assert all(row[1] < row[0] - 0.3 for rows in result["loss"].values() for row in rows.values())
    assert (tmp_path / "mutransfer.png").stat().st_size > 10_000
    checked = run("coord-check", *common, "--widths", "64,128,256", "--steps", "2", "--tp", "2", "--seeds", "2")
    assert "without muP" in checked.stdout, checked.stderr
    assert set(json.loads((tmp_path / "coord-check.json").read_text())["slopes"]) == {"activation", "update"}
    assert (tmp_path / "coord-check.png").stat().st_size > 10_000
    wrong = run("coord-check", *common, "--widths", "64,100")
    assert (wrong.returncode, wrong.stderr.count("error:")) == (2, 1)
    assert "width 100 is not a multiple of the head size 32" in wrong.stderr


@pytest.mark.parametrize(
    ("command", "extra", "message"),
    [
        ("coord-check", "--lr -1", "--lr -1: must be above 0"),
        ("coord-check", "--out {file}/there", "{file}/there: is not a directory: choose another --out"),
        ("mutransfer", "--lrs 0.001,0.002,inf", "write rising numbers above 0"),
    ],
)
def test_arguments_are_refused_before_training(
    repo_root: Path, tmp_path: Path, command: str, extra: str, message: str
) -> None:
    from tools import coord_check, mutransfer

    file = tmp_path / "file"
    file.touch()
    arguments = ["--params", str(repo_root / "params/tiny/phase1.yaml"), "--out", str(tmp_path / "out")]
    arguments += extra.format(file=file).split()
    with pytest.raises(InputError, match=re.escape(message.format(file=file))):
        {"coord-check": coord_check.main, "mutransfer": mutransfer.main}[command](arguments)
    assert not (tmp_path / "out").exists()
