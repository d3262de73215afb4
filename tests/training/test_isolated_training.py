"""Steps on packed rows are the steps on their conversations one a row: through TP, PP, recomputation and LoRA.

Seen: loss within 1.25e-7. Planted: documents not isolated -> 0.0094.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from finetune.chat_format import Encoded
from finetune.packing import BestFitRows, best_fit
from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.model.lora import LoraSettings
from megatron.crystalcoder.training.config import TrainConfig, WarmupDecay
from support.checkpoints import distinct_weights, save_hf
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.sequence_rows import write_h5
from support.training_runs import SEQ, column, tiny_config

DOCUMENTS, STEPS = 24, 4
pytestmark = pytest.mark.slow  # tests/model/test_isolation.py is the quick one
LORA = LoraSettings(rank=4, alpha=24.0)
TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=True)
TP2_PP2 = replace(TP2_SP, pipeline_model_parallel_size=2, recompute="full")
ALONE = ParallelConfig()  # with as many data-parallel ranks as there are
CASES: dict[str, tuple[ParallelConfig, LoraSettings | None]] = {
    "DP4": (ALONE, None),
    "TP2 SP DP2": (TP2_SP, None),
    "PP2 DP2": (PP2, None),
    "TP2 PP2 SP, recomputed": (TP2_PP2, None),
    "LoRA, TP2 PP2 SP, recomputed": (TP2_PP2, LORA),
}


def documents() -> list[Encoded]:
    """DOCUMENTS of them with some tokens trained, whose rows are as many as four ranks can share."""
    for seed in count():
        rng = np.random.default_rng(seed)
        lengths = rng.integers(3, SEQ + 1, DOCUMENTS)
        if len(best_fit(lengths, SEQ)) % 4 == 0:
            break
    made = []
    for length in lengths.tolist():
        ids = rng.integers(3, TINY.vocab_size, length).astype(np.int32)
        ids[0], ids[-1] = 1, 2
        made.append(Encoded(ids, rng.random(length) < 0.6))
    return made


def write(path: Path, rows: list[np.ndarray]) -> int:
    write_h5(path, np.stack(rows))
    return len(rows)


def config(
    folder: Path, save: str, rows: str, batch: int, parallel: ParallelConfig, lora: LoraSettings | None
) -> TrainConfig:
    """Steps of the whole file each, so that both ways see every document in every step."""
    schedule = WarmupDecay(3e-3, 3e-3, 0.0, 1.0 * STEPS * batch, "constant")
    found = tiny_config(folder / rows, folder / save, parallel=parallel, lora=lora, load=folder / "hf")
    found = replace(found, schedule=schedule, train_iters=STEPS, micro_batch_size=1, global_batch_size=batch)
    return replace(found, data=replace(found.data, isolate_documents=rows == "packed.h5"))


def train_all(folder: Path, packed: int) -> None:
    from megatron.crystalcoder.training.loop import train

    for name, (parallel, lora) in CASES.items():
        train(config(folder, name, "packed.h5", packed, parallel, lora))
    for name, lora in (("alone", None), ("alone, LoRA", LORA)):
        train(config(folder, name, "alone.h5", DOCUMENTS, ALONE, lora))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("isolated")
    save_hf(folder / "hf", distinct_weights())
    all_rows = BestFitRows(documents(), seq_length=SEQ, pad_id=2)
    packed = write(folder / "packed.h5", [all_rows[i] for i in range(len(all_rows))])
    write(folder / "alone.h5", [BestFitRows([document], seq_length=SEQ, pad_id=2)[0] for document in documents()])
    assert packed < DOCUMENTS
    run_on_ranks(4, train_all, folder, packed)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_train_as_their_conversations_alone(runs: Path, case: str) -> None:
    """The first loss is of the same weights; the later ones also of the same gradients and steps."""
    alone = column(runs / ("alone, LoRA" if "LoRA" in case else "alone"), "lm_loss")
    packed = column(runs / case, "lm_loss")
    np.testing.assert_allclose(packed, alone, atol=1e-6, rtol=0)
    assert alone[-1] < alone[0] - 0.1
