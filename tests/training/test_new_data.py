"""A run that goes on with other weights of its mixture: refused, or from its position in the new order, and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from data_prep.errors import InputError
from megatron.crystalcoder.checkpoint.open import open_checkpoint
from megatron.crystalcoder.data.loader import open_data
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry
from support.distributed import run_on_ranks
from support.reference_model import TINY
from support.sequence_rows import write_h5
from support.training_runs import SEQ, column, tiny_config, tiny_weights


def mixture(folder: Path, *weights: float, reference: bool = False) -> DataSettings:
    entries = tuple(MixtureEntry(folder / name, weight) for name, weight in zip("xy", weights, strict=True))
    return DataSettings(mixture=entries, order="mixture", reference_order=reference)


def runs(folder: Path) -> dict[str, Any]:
    """`parts`: 5 steps at weights 1:1, refused at 1:4, 5 steps there by request, 1 more without asking again.
    `whole`: the same rows in one file."""
    from megatron.crystalcoder.training.loop import train

    seen: dict[str, Any] = {"drawn": []}

    def run(save: str, data: DataSettings, iterations: int, **changes: Any) -> None:
        config = tiny_config(Path(), folder / save, data=data, **{"train_iters": iterations, **changes})
        train(
            config,
            initial_weights=cast(Any, tiny_weights()),
            on_checkpoint=lambda progress, account: seen["drawn"].append(account.drawn(progress.consumed_samples)),
        )

    old, new = mixture(folder, 1, 1), mixture(folder, 1, 4)
    run("parts", old, 5)
    longer = replace(new, mixture=(MixtureEntry(folder / "long", 1.0),))
    for name, data, changes in (
        ("weights", new, {}),
        ("reference", mixture(folder, 1, 1, reference=True), {}),
        ("length", longer, {"seq_length": 2 * SEQ, "new_data_order": True}),
    ):
        try:
            run("parts", data, 10, **changes)
        except InputError as error:
            seen[name] = str(error)
    run("parts", new, 10, new_data_order=True)
    run("parts", new, 11)
    run("whole", DataSettings(paths=(folder / "whole.h5",), order="single"), 11)
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("new-data")
    generator = np.random.default_rng(2)
    for name, count, length in (("x", 30, SEQ), ("y", 50, SEQ), ("long", 8, 2 * SEQ)):
        text = generator.integers(0, TINY.vocab_size, (count, length + 1), dtype=np.int32)
        rows = np.stack([text[:, :-1], np.ones_like(text[:, 1:]), text[:, 1:]], axis=1)
        write_h5(folder / name / "data.h5", rows)
    taken = []
    for weights, first, end in (((1, 1), 0, 40), ((1, 4), 40, 88)):
        source, order = open_data(mixture(folder, *weights), seq_length=SEQ, vocab_size=TINY.vocab_size)
        numbers = order.rows(first, micro_batch_size=end - first, dp_rank=0, dp_size=1).tolist()
        taken += [source[number] for number in numbers]
    write_h5(folder / "whole.h5", np.stack(taken))
    return folder, run_on_ranks(1, runs, folder)[0]


def test_other_data_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    """Other weights, another order; with the flag still rows of another length, which have no such position."""
    _, seen = finished
    for name in ("weights", "reference"):
        assert "stopped after 40 samples of other data" in seen[name]
        assert "--new-data-order" in seen[name]
    assert "have 32 tokens, those given now 64" in seen["length"]


def test_by_request_the_run_goes_on_in_the_new_order(finished: tuple[Path, dict[str, Any]]) -> None:
    """To the bit the losses of the rows of both orders in one file; the rate goes on too. Planted: the new order
    entered at its first row: the sixth loss differs, fails."""
    folder, _ = finished
    for key in ("lm_loss", "lr", "consumed_samples"):
        np.testing.assert_array_equal(column(folder / "parts", key), column(folder / "whole", key), err_msg=key)
    assert len(column(folder / "parts", "lm_loss")) == 11


def test_samples_are_counted_over_both_orders(finished: tuple[Path, dict[str, Any]]) -> None:
    """Each dataset's samples, by the order that was in force. Planted: the new order counted from sample 0, fails."""
    folder, seen = finished
    x, y = str(folder / "x"), str(folder / "y")
    old, new = (
        open_data(mixture(folder, *weights), seq_length=SEQ, vocab_size=TINY.vocab_size)[1]
        for weights in ((1, 1), (1, 4))
    )
    before, position, end = old.drawn(40), new.drawn(40), new.drawn(88)
    expected = {name: before[i] + end[i] - position[i] for i, name in enumerate((x, y))}
    assert sum(expected.values()) == 88
    record = vars(open_checkpoint(folder / "parts").args)
    assert record["data_drawn"] == expected == seen["drawn"][5]
    assert record["data_since"] == 40
    assert seen["drawn"][0] == {x: 0, y: 0}


def test_a_checkpoint_tells_its_configuration_and_code(finished: tuple[Path, dict[str, Any]]) -> None:
    record = vars(open_checkpoint(finished[0] / "parts").args)
    config = json.loads(record["run_config"])
    assert (config["train_iters"], config["optimizer"]["clip_grad"]) == (11, 1.0)
    assert config["data"]["mixture"][1]["weight"] == 4
    assert record["code_version"]
