"""The plan's memory against the most bytes of tensors that are alive during a training step, and what saves them.

On a CPU, uncompiled: the formula's terms for that are the GPU's but for the loss's passes.

Planted once each and caught: SwiGLU's workspace beside the loss's, a chunk of the loss more, 3 bytes of state in 8bit,
the linear layers' inputs in two bytes in fp8, in offloading a parameter that comes back as another tensor.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megatron.crystalcoder.model import offload
from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from megatron.crystalcoder.model.fusions import Speed
from megatron.crystalcoder.model.kernels import compiled as compiled_passes
from megatron.crystalcoder.training import memory
from megatron.crystalcoder.training.config import OptimizerSettings
from megatron.crystalcoder.training.memory import Layout, Savings, rank_memory
from support.live_memory import LiveMemory
from support.training_runs import tiny_config
from tools.bench.synthetic import TiledWeights

# Large enough that what the formula leaves out (labels, masks, sums of one number a token) is nothing.
MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=128,
    num_layers=4,
    num_attention_heads=4,
    ffn_hidden_size=352,
    rotary_dim=8,
    max_sequence_length=4096,
)
SEQ, BATCH = 512, 4
RUNS = {
    "fp32": (False, "none", Savings(loss_chunk=512)),
    "bf16": (True, "none", Savings(loss_chunk=512)),
    "small chunks": (True, "none", Savings(loss_chunk=128)),
    "moments in bf16": (True, "none", Savings("bf16", loss_chunk=512)),
    "moments in 8bit": (True, "none", Savings("8bit", loss_chunk=512)),
    "fp8": (True, "none", Savings(fp8=True, loss_chunk=512)),
    "selective": (True, "selective", Savings(loss_chunk=512)),
    "full": (True, "full", Savings(loss_chunk=512)),
    "offload": (True, "none", Savings(offload_activations=True, loss_chunk=512)),
    "full, offload": (True, "full", Savings(offload_activations=True, loss_chunk=512)),
}


def run_steps(
    bf16: bool, recompute: Any, savings: Savings, seq: int = SEQ, batch: int = BATCH, compiled: bool = False
) -> dict[str, Any]:
    """Two steps of two micro-batches; bytes at rest after the first, at most in the second, and the last losses."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.resume import Start
    from megatron.crystalcoder.training.step import train_step

    platform.initialize()
    config = tiny_config(
        Path(),
        model=MODEL,
        bf16=bf16,
        seq_length=seq,
        micro_batch_size=batch,
        global_batch_size=batch * 2,
        parallel=ParallelConfig(recompute=recompute),
        optimizer=OptimizerSettings(states=savings.optimizer_states),
        speed=Speed(
            fp8="emulated" if savings.fp8 else "off",
            offload=savings.offload_activations,
            loss_chunk=savings.loss_chunk,
            compile="ops" if compiled else "off",
        ),
    )
    platform.initialize_model_parallel(config.parallel)
    ids = torch.randint(0, MODEL.vocab_size, (batch, seq + 1), generator=torch.Generator().manual_seed(1))
    batches = [
        {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],
            "position_ids": torch.arange(seq).expand(batch, seq),
            "loss_mask": torch.ones(batch, seq),
        }
    ] * 2
    inner = compiled_passes._compiled
    with LiveMemory() as live, pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled_passes, "_compiled", lambda *of: live.outside(inner(*of)))
        model, optimizer = build(config, Start("test", TiledWeights(MODEL)))
        train_step(model, optimizer, iter(batches), config, lr=1e-3)
        rest = live.peak = live.now
        live.largest = 0
        result = train_step(model, optimizer, iter(batches), config, lr=1e-3)
    gradients = {name: cast(Any, parameter).main_grad.clone() for name, parameter in model.named_parameters()}
    platform.shutdown()
    return {
        "rest": rest,
        "peak": live.peak,
        "largest": live.largest,
        "loss": result.lm_loss,
        "gradients": gradients,
    }


@pytest.fixture
def small_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model this small, tensors from 32 KiB on are."""
    for module in (offload, memory):
        monkeypatch.setattr(module, "OFFLOADED_FROM", 32 << 10)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("small_is_offloaded")
def test_the_peak_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2.5%, uncompiled. The host's memory is this machine's, too; what went there is counted by itself."""
    bf16, recompute, savings = RUNS[name]
    away = 0
    copy = offload._InHost.__init__

    def counted(self: Any, whole: torch.Tensor, stream: Any) -> None:
        nonlocal away
        away += whole.nbytes
        copy(self, whole, stream)

    monkeypatch.setattr(offload._InHost, "__init__", counted)
    measured = run_steps(bf16, recompute, savings)
    predicted = rank_memory(
        MODEL,
        Layout(micro_batch=BATCH, recompute=cast(Any, recompute)),
        seq_length=SEQ,
        micro_batches=2,
        bf16=bf16,
        savings=savings,
        compiled=False,
    )
    at_rest = predicted.weights + predicted.gradients + predicted.optimizer
    assert measured["rest"] == pytest.approx(at_rest, rel=0.003)
    assert measured["peak"] == pytest.approx(predicted.total + predicted.host, rel=0.025)
    assert away / 4 == pytest.approx(predicted.host, rel=0.01)  # of four micro-batches
    assert (predicted.host > 0) == savings.offload_activations


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["bf16", "moments in 8bit", "fp8", "full"])
def test_the_peak_of_a_compiled_step_is_predicted(name: str) -> None:
    """As a GPU runs it, and with the losses of an uncompiled step."""
    bf16, recompute, savings = RUNS[name]
    measured, plain = (run_steps(bf16, recompute, savings, compiled=each) for each in (True, False))
    predicted = rank_memory(
        MODEL,
        Layout(micro_batch=BATCH, recompute=cast(Any, recompute)),
        seq_length=SEQ,
        micro_batches=2,
        bf16=bf16,
        savings=savings,
    )
    assert measured["peak"] == pytest.approx(predicted.total, rel=0.05)
    assert measured["loss"] == pytest.approx(plain["loss"], rel=2e-3)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.usefixtures("small_is_offloaded")
def test_saving_memory_changes_no_bit(bf16: bool) -> None:
    """Recomputed or fetched, what the backward pass sees is what the forward pass made."""
    plain = run_steps(bf16, "none", Savings(), seq=64)
    for recompute in ("none", "selective", "full"):
        for away in (False, True):
            other = run_steps(bf16, recompute, Savings(offload_activations=away), seq=64)
            assert other["loss"] == plain["loss"]
            assert all(torch.equal(other["gradients"][name], each) for name, each in plain["gradients"].items())


def test_memory_is_linear_in_the_length_of_a_sequence() -> None:
    """Recomputed, offloaded: no tensor of s x s. Planted: plain attention, whose scores are the largest, fails."""
    savings = Savings(offload_activations=True, loss_chunk=128)
    short, long = (run_steps(True, "full", savings, seq=length, batch=1) for length in (512, 2048))
    widest = max(3 * MODEL.hidden_size, 2 * MODEL.ffn_hidden_size)
    assert long["largest"] <= max(2048 * widest * 4, MODEL.num_parameters * 4)
    assert long["peak"] - long["rest"] < 4.3 * (short["peak"] - short["rest"])


def test_long_sequences_fit_by_the_same_formula() -> None:
    """32,768 tokens of the 7B model: what is kept grows with s alone, and of it a GPU has but a layer's."""
    big = ModelConfig(32032, 4096, 32, 32, 11008, 32)
    layout = Layout(recompute="full")

    def at(seq: int, *, away: bool = False) -> memory.RankMemory:
        savings = Savings(offload_activations=away)
        return rank_memory(big, layout, seq_length=seq, micro_batches=1, savings=savings)

    assert at(32768).activations == pytest.approx(16 * at(2048).activations)
    away = at(32768, away=True)
    assert away.host == 33 * 32768 * 4096 * 2
    assert away.activations == at(32768).activations - away.host
    assert replace(away, layer=0).total < replace(at(32768), layer=0).total
