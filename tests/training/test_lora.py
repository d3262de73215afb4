"""LoRA against a plain fp64 loop that trains A and B of merged weights, at every layout; its files against PEFT.

Seen: loss within 1.02e-6.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.adapter import merge_into, read_adapter
from megatron.crystalcoder.checkpoint.convert import convert
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.lora import TARGETS, LoraSettings
from megatron.crystalcoder.training import flags
from megatron.crystalcoder.training.config import TrainConfig
from megatron.crystalcoder.training.schedules import learning_rate
from support.checkpoints import distinct_weights, save_hf
from support.distributed import run_on_ranks
from support.reference_model import TINY, reference_logits
from support.training_runs import GLOBAL_BATCH, column, tiny_config, write_rows

ALL = LoraSettings(rank=4, alpha=24.0)
SOME = LoraSettings(rank=3, alpha=6.0, targets=("attn.c_attn", "mlp.c_fc", "mlp.c_proj"))
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, overlap_grad_reduce=True)
TP2 = ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True)
TP2_PP2 = ParallelConfig(
    tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True, recompute="full"
)
# What the default tests train, on two ranks, and what the slow ones do, on four.
TRAINED = "TP2 SP"
FEW_CASES: dict[str, tuple[ParallelConfig, LoraSettings]] = {TRAINED: (TP2_SP, ALL)}
CASES: dict[str, tuple[ParallelConfig, LoraSettings]] = {
    "TP2 SP DP2": (TP2_SP, ALL),
    "TP2 PP2 SP, recomputed, some layers": (TP2_PP2, SOME),
    "DP4": (ParallelConfig(use_distributed_optimizer=True), ALL),
    "TP2 DP2": (TP2, ALL),
    "TP2 PP2 SP, recomputed": (TP2_PP2, ALL),
}
STEPS = 4
ADAPTER = f"iter_{STEPS:07d}/adapter"


def lora_config(folder: Path, save: str, parallel: ParallelConfig, lora: LoraSettings, **changes: Any) -> TrainConfig:
    config = tiny_config(
        folder / "rows.jsonl", folder / save, parallel=parallel, lora=lora, load=folder / "hf", micro_batch_size=2
    )
    schedule = replace(config.schedule, lr=3e-2, min_lr=3e-3)
    return replace(config, **{"schedule": schedule, "train_iters": STEPS, **changes})


def first_a(name: str, settings: LoraSettings) -> Tensor:
    """The A that a new adapter starts with, as the trainer draws it."""
    from megatron.crystalcoder.training.lora import _new_pair

    return _new_pair(name, name.split(".", 3)[3], settings, TINY)[0]


def plain_loop(rows: np.ndarray, config: TrainConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each step, and A and B after the last, in fp64; Adam with one lr and decay on both matrices."""
    lora = config.lora
    assert lora is not None
    frozen = {name: x.double() for name, x in distinct_weights().items()}
    trained: dict[str, Tensor] = {}
    for layer in range(TINY.num_layers):
        for target in lora.targets:
            name = f"transformer.h.{layer}.{target}"
            a = first_a(name, lora).double()
            trained[f"{name}.A"] = a.requires_grad_()
            trained[f"{name}.B"] = torch.zeros(frozen[f"{name}.weight"].shape[1], lora.rank).double().requires_grad_()
    moments = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in trained.items()}
    settings, losses = config.optimizer, []
    for step in range(config.train_iters):
        start = step * GLOBAL_BATCH
        batch = torch.from_numpy(rows[np.arange(start, start + GLOBAL_BATCH) % len(rows)]).long()
        weights = dict(frozen)
        for name in (key.removesuffix(".A") for key in trained if key.endswith(".A")):
            product = trained[f"{name}.B"] @ trained[f"{name}.A"]
            weights[f"{name}.weight"] = frozen[f"{name}.weight"] + lora.alpha / lora.rank * product.t()
        tokens, mask, labels = batch.unbind(1)
        logits = reference_logits(weights, TINY, tokens)
        ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
        loss = ce.sum() / mask.sum()
        losses.append(float(loss))
        gradients = torch.autograd.grad(loss, list(trained.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        clip = min(1.0, settings.clip_grad / (float(norm) + 1e-6))
        lr = learning_rate(config.schedule, step=step, samples=start)
        with torch.no_grad():
            for (name, p), g in zip(trained.items(), gradients, strict=True):
                m, v = moments[name]
                m.mul_(settings.adam_beta1).add_(g * clip, alpha=1 - settings.adam_beta1)
                v.mul_(settings.adam_beta2).add_((g * clip).square(), alpha=1 - settings.adam_beta2)
                m_hat, v_hat = m / (1 - settings.adam_beta1 ** (step + 1)), v / (1 - settings.adam_beta2 ** (step + 1))
                p -= lr * (m_hat / (v_hat.sqrt() + settings.adam_eps) + settings.weight_decay * p)
    return losses, {name: x.detach() for name, x in trained.items()}


def train_all(folder: Path, cases: dict[str, tuple[ParallelConfig, LoraSettings]]) -> None:
    from megatron.crystalcoder.training.loop import train

    for name, (parallel, lora) in cases.items():
        train(lora_config(folder, name, parallel, lora))


def train_in_parts(folder: Path) -> None:
    """Stopped at TP2/PP2, taken up at TP2 with data parallelism."""
    from megatron.crystalcoder.training.loop import train

    train(lora_config(folder, "parts", TP2_PP2, ALL, train_iters=2))
    train(lora_config(folder, "parts", TP2_SP, ALL))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("lora")
    save_hf(folder / "hf", distinct_weights())
    rows = write_rows(folder / "rows.jsonl")
    run_on_ranks(2, train_all, folder, FEW_CASES)
    return folder, rows


def test_against_fp64_loop(runs: tuple[Path, np.ndarray]) -> None:
    check_against_fp64_loop(*runs, TRAINED, *FEW_CASES[TRAINED])


@pytest.mark.slow
def test_more_layouts_against_fp64_loop(runs: tuple[Path, np.ndarray]) -> None:
    run_on_ranks(4, train_all, runs[0], CASES)
    for case in CASES:
        check_against_fp64_loop(*runs, case, *CASES[case])


def check_against_fp64_loop(
    folder: Path, rows: np.ndarray, save: str, parallel: ParallelConfig, lora: LoraSettings
) -> None:
    losses, trained = plain_loop(rows, lora_config(folder, save, parallel, lora))
    ours = column(folder / save, "lm_loss")
    np.testing.assert_allclose(ours, losses, atol=3e-6, rtol=0)
    assert max(float(x.abs().max()) for name, x in trained.items() if name.endswith(".B")) > 0.01
    adapter = read_adapter(folder / save / ADAPTER, TINY)
    assert adapter.settings == lora
    for name, (a, b) in adapter.matrices.items():
        torch.testing.assert_close(a.double(), trained[f"{name}.A"], atol=2e-4, rtol=0)
        torch.testing.assert_close(b.double(), trained[f"{name}.B"], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_a_run_goes_on_at_another_layout(runs: tuple[Path, np.ndarray]) -> None:
    folder, _ = runs
    run_on_ranks(4, train_in_parts, folder)
    whole = column(folder / TRAINED, "lm_loss")
    np.testing.assert_allclose(column(folder / "parts", "lm_loss"), whole, atol=3e-6, rtol=0)


def test_a_checkpoint_holds_the_adapter_alone(runs: tuple[Path, np.ndarray]) -> None:
    folder, _ = runs
    saved = (folder / TRAINED / ADAPTER).parent
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert size < 4 * sum(x.numel() for x in distinct_weights().values())
    checkpoint = open_checkpoint(folder / TRAINED)
    assert checkpoint.adapter == saved / "adapter"
    with pytest.raises(InputError, match="finetune export"):
        convert(folder / TRAINED, folder / "out", format="hf", report=lambda line: None)
    assert not (folder / "out").exists()


@pytest.fixture(scope="module")
def merged(runs: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = runs
    target = tmp_path_factory.mktemp("merged") / "hf"
    convert(folder / "hf", target, format="hf", report=lambda line: None)
    merge_into(target, read_adapter(folder / TRAINED / ADAPTER, TINY))
    return target


def test_merged_weights_give_the_loss_that_training_saw(runs: tuple[Path, np.ndarray], merged: Path) -> None:
    """The files hold W + alpha / r * B A, transposed as `Conv1D` stores it, and that lowers the loss."""
    folder, rows = runs
    weights = {
        name: x.double() for name, x in ((n, open_checkpoint(merged).weights.read(n)) for n in distinct_weights())
    }
    tokens, mask, labels = torch.from_numpy(rows[:GLOBAL_BATCH]).long().unbind(1)
    ce = torch.nn.functional.cross_entropy(
        reference_logits(weights, TINY, tokens).transpose(1, 2), labels, reduction="none"
    )
    losses = plain_loop(rows[:GLOBAL_BATCH], lora_config(folder, "x", TP2, ALL, train_iters=1))[0]
    assert float((ce * mask).sum() / mask.sum()) < losses[0] - 0.1
    base = {name: x.double() for name, x in distinct_weights().items()}
    for name, (a, b) in read_adapter(folder / TRAINED / ADAPTER, TINY).matrices.items():
        base[f"{name}.weight"] += 6.0 * (b.double() @ a.double()).t()
    for name in base:
        torch.testing.assert_close(weights[name], base[name], atol=1e-5, rtol=0, msg=name)


def test_peft_loads_the_adapter(runs: tuple[Path, np.ndarray], merged: Path) -> None:
    """PEFT's model and its own merge give the logits of ours."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    import CrystalCoder  # noqa: F401 - registers the model

    folder, rows = runs
    plain = folder / "plain"
    convert(folder / "hf", plain, format="hf", report=lambda line: None)
    ids = torch.from_numpy(rows[:4, 0]).long()
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(plain)
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, folder / TRAINED / ADAPTER)
        torch.testing.assert_close(theirs(ids).logits, ours, atol=2e-5, rtol=0)
        torch.testing.assert_close(theirs.merge_and_unload()(ids).logits, ours, atol=2e-5, rtol=0)
    assert float((before - ours).abs().max()) > 0.1


def test_refusals(runs: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = runs
    sizes = "--seq-length 32 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1"
    arguments = [*sizes.split(), "--data-path", str(folder / "rows.jsonl"), "--load", str(folder / "hf")]
    assert flags.parse([*arguments, "--lora-rank", "8"]).lora == LoraSettings(8, 16.0, TARGETS)
    for extra, says in (
        (["--lora-alpha", "8"], "need --lora-rank"),
        (["--lora-rank", "8", "--lora-target-modules", "q_proj"], "LoRA target 'q_proj': use some of attn.c_attn"),
        (["--lora-rank", "-1"], "must be above 0"),
        (["--lora-rank", "8", "--ckpt-format", "torch"], "saved in torch_dist alone"),
    ):
        with pytest.raises(InputError, match=says):
            flags.parse([*arguments, *extra])
    from megatron.crystalcoder.training.resume import find_start

    config = lora_config(folder, TRAINED, TP2_SP, ALL)
    with pytest.raises(InputError, match="give --lora-rank 4 --lora-alpha 24"):
        find_start(replace(config, lora=None))
    with pytest.raises(InputError, match="trained an adapter: export it"):
        find_start(replace(config, save=None, load=folder / TRAINED, finetune=True))
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(InputError, match="is not a whole LoRA adapter"):
        read_adapter(broken, TINY)
