"""A row of several documents gives each the losses that it has alone, in the trainer and in the Hugging Face model.

Planted once each: attention over the whole row 0.81; a document found one position late 0.65. Rotary is relative, so in
fp32 these rows cannot tell whether positions start again; a test of its own asks whether they are obeyed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finetune.chat_format import Encoded
from finetune.packing import BestFitRows
from megatron.crystalcoder.data.isolation import documents_and_positions
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.isolation import _flex, attend_in_documents, document_mask
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.training_runs import tiny_weights

S = 48
LENGTHS = [20, 9, 19, 30, 18, 48, 5]


def documents() -> list[Encoded]:
    """Tokens from 3 up, between 1 and 2 as `<s>` and `</s>` stand."""
    rng = np.random.default_rng(11)
    made = []
    for length in LENGTHS:
        ids = rng.integers(3, TINY.vocab_size, length).astype(np.int32)
        ids[0], ids[-1] = 1, 2
        made.append(Encoded(ids, np.ones(length, np.bool_)))
    return made


def packed_rows() -> tuple[torch.Tensor, list[list[int]]]:
    rows = BestFitRows(documents(), seq_length=S, pad_id=2)
    held = [[part.document for part in rows.parts(i)] for i in range(len(rows))]
    return torch.from_numpy(np.stack([rows[i] for i in range(len(rows))])).long(), held


def test_documents_are_found_by_their_beginnings() -> None:
    rows, held = packed_rows()
    numbers, positions = documents_and_positions(rows[:, 0], rows[:, 2])
    for row, (row_numbers, row_positions) in enumerate(zip(numbers.tolist(), positions.tolist(), strict=True)):
        lengths = [LENGTHS[i] for i in held[row]]
        lengths[-1] += S - sum(lengths)  # padding goes on with the last
        assert row_numbers == [n for n, length in enumerate(lengths) for _ in range(length)]
        assert row_positions == [p for length in lengths for p in range(length)]
    window = torch.arange(5, 5 + S + 1)[None]
    numbers, positions = documents_and_positions(window[:, :-1], window[:, 1:])
    assert not numbers.any()
    assert positions[0].tolist() == list(range(S))


def losses_and_gradients(
    parallel: ParallelConfig, recompute: str
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Token losses of the packed rows in one batch, then of each document alone; and the gradients of both sums."""
    from dataclasses import replace

    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.model.gpt import build_model

    parallel = replace(parallel, recompute=recompute)
    platform.initialize_model_parallel(parallel)
    rows, held = packed_rows()
    results, gradients = [], {}
    for way in ("packed", "alone"):
        model = build_model(TINY, parallel)
        load_weights(model, tiny_weights(), TINY, parallel)  # type: ignore[arg-type]
        model.train()
        losses = []
        if way == "packed":
            tokens, labels = rows[:, 0], rows[:, 2]
            numbers, positions = documents_and_positions(tokens, labels)
            out = model(tokens, positions, numbers, labels=labels)
            for row, members in enumerate(held):
                at = 0
                for index in members:
                    losses.append((index, out[row, at : at + LENGTHS[index] - 1]))
                    at += LENGTHS[index]
        else:
            for index, document in enumerate(documents()):
                # To an even length, as sequence parallelism asks for; what follows is not seen.
                ids = torch.from_numpy(np.append(document.ids, [2] * (len(document.ids) % 2))).long()[None]
                labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
                out = model(ids, torch.arange(ids.shape[1])[None], None, labels=labels)
                losses.append((index, out[0, : LENGTHS[index] - 1]))
        ordered = [loss for _, loss in sorted(losses, key=lambda item: item[0])]
        torch.cat(ordered).sum().backward()
        results.append(torch.cat(ordered).detach())
        for name, parameter in model.named_parameters():
            if parallel.sequence_parallel and getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad)  # each rank saw its part of the sequence
            gradients.setdefault(name, []).append(parameter.grad)
    return results, gradients


@pytest.mark.parametrize(
    ("ranks", "parallel", "recompute"),
    [
        (1, ParallelConfig(), "none"),
        (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "full"),
    ],
)
def test_the_trainer_is_exact(ranks: int, parallel: ParallelConfig, recompute: str) -> None:
    for (packed, alone), gradients in run_on_ranks(ranks, losses_and_gradients, parallel, recompute):
        assert len(packed) == sum(LENGTHS) - len(LENGTHS)
        torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
        for name, (ours, theirs) in gradients.items():
            scale = float(theirs.abs().max()) + 1e-12
            torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0, msg=name)


def losses_at(step: int) -> torch.Tensor:
    """Token losses of the first packed row with every position given to `step` tokens."""
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.checkpoint.load import load_weights
    from megatron.crystalcoder.model.gpt import build_model

    platform.initialize_model_parallel(ParallelConfig())
    model = build_model(TINY, ParallelConfig())
    load_weights(model, tiny_weights(), TINY, ParallelConfig())  # type: ignore[arg-type]
    tokens, labels = packed_rows()[0][:1, 0], packed_rows()[0][:1, 2]
    with torch.no_grad():
        return model(tokens, torch.arange(S)[None] // step, torch.zeros_like(tokens), labels=labels)


def test_the_given_positions_turn_queries_and_keys() -> None:
    """Planted: the angles of 0, 1, 2 ... whatever is given -> equal, fails."""
    (once,) = run_on_ranks(1, losses_at, 1)
    (twice,) = run_on_ranks(1, losses_at, 2)
    assert float((once - twice).abs().max()) > 1e-3


def test_the_hugging_face_model_is_exact() -> None:
    """Positions that start again at 0 begin the next document."""
    from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel

    torch.manual_seed(3)
    config = CrystalCoderConfig(
        vocab_size=TINY.vocab_size, n_positions=64, n_embd=48, n_layer=2, n_head=4, n_inner=64, rotary_dim=4,
        initializer_range=0.3,
    )  # fmt: skip
    model = CrystalCoderLMHeadModel(config).eval()
    rows, held = packed_rows()
    _, positions = documents_and_positions(rows[:, 0], rows[:, 2])
    for row, members in enumerate(held):
        with torch.no_grad():
            packed = token_losses(model, rows[row : row + 1, 0], positions[row : row + 1])
        at = 0
        for index in members:
            ids = torch.from_numpy(documents()[index].ids).long()[None]
            with torch.no_grad():
                alone = token_losses(model, ids, None)
            torch.testing.assert_close(packed[at : at + len(alone)], alone, atol=1e-6, rtol=0)
            at += LENGTHS[index]


def token_losses(model: Any, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    logits = model(ids, position_ids=positions, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_both_kernels_are_the_formula() -> None:
    """The masked one, and flex attention as it stands (uncompiled: what runs on a GPU is compiled from it)."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, 128, 16, generator=generator) for _ in range(3))
    numbers = (torch.rand(2, 128, generator=generator) < 0.1).long().cumsum(1)
    scores = (q.double() @ k.double().transpose(2, 3) / 16).masked_fill(~document_mask(numbers), float("-inf"))
    expected = scores.softmax(-1) @ v.double()
    for ours in (attend_in_documents(q, k, v, numbers, 1 / 16), _flex(q, k, v, numbers, 1 / 16, compiled=False)):
        torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


def test_the_layers_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are recomputed, which get another tensor of the same memory; another micro-batch gets its own.

    Planted: a mask for each layer -> 4 calls; one by shape alone -> the second micro-batch's attention is off.
    """
    from torch.nn.attention import flex_attention

    made, make = [], flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, **k: made.append(1) or make(*a, **k))
    q, k, v = (torch.randn(1, 1, 128, 16) for _ in range(3))
    for number in (1, 2):
        documents_bs = (torch.arange(128)[None] >= 40 * number).long()
        expected = attend_in_documents(q, k, v, documents_bs, 1.0)
        for layer_gets in (documents_bs, documents_bs.detach()):
            ours = _flex(q, k, v, layer_gets, 1.0, compiled=False)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert len(made) == number
