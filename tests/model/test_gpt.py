"""The Megatron model against an independent fp64 restatement and the reference's own logits, at every layout.

Planted once each, on random weights whose logits are right to 1.5e-6: half-split instead of interleaved rotary moves a
logit by 0.6, 1/sqrt(d) by 1.6, the SwiGLU halves of one layer's bias swapped by 0.4, no embedding scale by 1.9, an
output scale without the width scale by 5.5, a LayerNorm eps of 1e-6 by 1.3e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.crystalcoder.model.config import ModelConfig, ParallelConfig
from support.distributed import run_on_ranks
from support.reference_model import TINY, random_weights, reference_logits

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(recompute="full"),
    ParallelConfig(tensor_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute="selective"),
    ParallelConfig(pipeline_model_parallel_size=2),
    ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, recompute="full"),
    ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
    ParallelConfig(pipeline_model_parallel_size=4),
]


class DictSource:
    """A WeightSource over tensors in memory."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self._weights = config, weights

    def names(self) -> list[str]:
        return list(self._weights)

    def read(self, name: str) -> Tensor:
        return self._weights[name]


Case = tuple[ParallelConfig, Tensor, Tensor]  # a layout, tokens and labels


@dataclass
class Outcome:
    """What one rank has of one case: logits (b, s, v) and loss (b, s) on the last stage; on the first, with `backward`,
    the gradient of the loss's sum by this rank's columns of the first layer's attention output matrix."""

    logits: Tensor | None
    loss: Tensor | None
    gradient: Tensor | None


def run_cases(cases: list[Case], source: Any, backward: bool) -> list[Outcome]:
    """On this rank: each case's outcome. source: the weights, or a checkpoint folder."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.checkpoint.open import open_checkpoint
    from megatron.crystalcoder.model.gpt import build_model

    weights = open_checkpoint(source).weights if isinstance(source, Path) else source
    outcomes = []
    for parallel, tokens_bs, labels_bs in cases:
        platform.initialize_model_parallel(parallel)
        model = build_model(weights.config, parallel)
        load_weights(model, weights, weights.config, parallel)
        outcomes.append(through_the_pipeline(model, tokens_bs, labels_bs, backward))
    return outcomes


def through_the_pipeline(model: Any, tokens_bs: Tensor, labels_bs: Tensor, backward: bool) -> Outcome:
    """One micro-batch through all stages, once for the logits and once for the loss."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    b, s = tokens_bs.shape
    positions_bs = torch.arange(s).expand(b, s)

    def run(labels: Tensor | None, forward_only: bool) -> Tensor | None:
        def forward_step(_: Any, stage: Any) -> Any:
            def keep(output: Tensor) -> tuple[Tensor, Tensor]:
                return output.sum(), output.detach()

            return stage(tokens_bs, positions_bs, None, labels=labels), keep

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=s,
            micro_batch_size=b,
            forward_only=forward_only,
        )
        return outputs[0] if parallel_state.is_pipeline_last_stage() else None

    logits, loss = run(None, forward_only=True), run(labels_bs, forward_only=not backward)
    if logits is not None:
        logits = gather_from_tensor_model_parallel_region(logits)
    gradient = None
    if backward and parallel_state.is_pipeline_first_stage():
        gradient = model.decoder.layers[0].self_attention.linear_proj.weight.grad
    return Outcome(logits, loss, gradient)


def test_every_layout_equals_the_fp64_restatement():
    tokens_bs = torch.randint(0, TINY.vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))
    labels_bs = torch.randint(0, TINY.vocab_size, (2, 64), generator=torch.Generator().manual_seed(4))
    weights = random_weights(TINY, seed=2)
    exact = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    logits = reference_logits(exact, TINY, tokens_bs)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels_bs, reduction="none")
    loss.sum().backward()
    gradient = exact["transformer.h.0.attn.c_proj.weight"].grad.T  # [out, in], as Megatron has it

    cases = [(parallel, tokens_bs, labels_bs) for parallel in LAYOUTS]
    by_rank = run_on_ranks(4, run_cases, cases, DictSource(TINY, weights), True)
    # Rank 0 is of the first stage and the first tensor-parallel rank, rank 3 of the last stage, at every layout.
    for parallel, first, last in zip(LAYOUTS, by_rank[0], by_rank[3], strict=True):
        assert (last.logits - logits).abs().max() < 1e-5, parallel
        assert (last.loss - loss).abs().max() < 1e-5, parallel
        own = gradient[:, : gradient.shape[1] // parallel.tensor_model_parallel_size]
        assert (first.gradient - own).norm() < 1e-5 * own.norm(), parallel


def test_reference_checkpoint_gives_the_reference_logits(shared: Path):
    """The reference's own weights, tokens and logits, short at four layouts and 2048 long at one.

    The noise floor of fp32 against fp64 is 1.7e-5.
    """
    truth = {name: np.load(shared / "fixtures/reference" / f"{name}.npz") for name in ("tiny_short", "tiny_long")}
    runs = [("tiny_short", LAYOUTS[i]) for i in (0, 3, 4, 5)] + [("tiny_long", LAYOUTS[5])]
    cases = [
        (parallel, torch.from_numpy(truth[name]["input_ids"]), torch.from_numpy(truth[name]["label_ids"]))
        for name, parallel in runs
    ]
    outcomes = run_on_ranks(4, run_cases, cases, shared / "fixtures/hf_tiny", False)[-1]
    for (name, parallel), outcome in zip(runs, outcomes, strict=True):
        expected = torch.from_numpy(truth[name]["logits_at_cols"])
        mask = torch.from_numpy(truth[name]["loss_mask"]).double()
        masked_loss = float((outcome.loss.double() * mask).sum() / mask.sum())
        assert (outcome.logits[..., truth[name]["logit_cols"]].view_as(expected) - expected).abs().max() < 1e-4, (
            parallel
        )
        assert masked_loss == pytest.approx(float(truth[name]["loss_masked"]), abs=1e-5), parallel


def test_bf16_is_close_and_the_loss_is_fp32():
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.model.gpt import build_model

    config = replace(TINY, num_layers=2)
    weights = random_weights(config, seed=6)
    tokens_bs = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(7))
    expected = reference_logits({name: tensor.double() for name, tensor in weights.items()}, config, tokens_bs)
    platform.initialize()
    platform.initialize_model_parallel(ParallelConfig())
    model = build_model(config, ParallelConfig(), dtype=torch.bfloat16)
    load_weights(model, DictSource(config, weights), config, ParallelConfig())
    positions_bs = torch.arange(64).expand(2, 64)
    loss = model(tokens_bs, positions_bs, None, labels=tokens_bs)
    assert loss.dtype == torch.float32
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    error = (model(tokens_bs, positions_bs, None).float() - expected).norm() / expected.norm()
    platform.shutdown()
    assert 1e-4 < error < 3e-2


def test_weights_are_nan_until_loaded():
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.model.gpt import build_model

    platform.initialize()
    platform.initialize_model_parallel(ParallelConfig())
    model = build_model(TINY, ParallelConfig())
    platform.shutdown()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(matrices) == 1 + 4 * TINY.num_layers
    assert all(matrix.isnan().all() for matrix in matrices)
