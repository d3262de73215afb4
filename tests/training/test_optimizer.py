"""Every parameter's lr factor and weight decay, as the live optimizer's groups have them, at every layout.

Planted: weight decay on linear biases -> linear_proj.bias has 0.1, at every layout; lr scaled on the head's copy ->
output_layer.weight has 0.25, at every layout with PP > 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from megatron.crystalcoder.model.config import ParallelConfig
from megatron.crystalcoder.training.config import OptimizerSettings
from support.distributed import run_on_ranks
from support.training_runs import tiny_config, tiny_weights

SCALE, DECAY = 0.25, 0.1
# The end of a parameter's name -> (lr factor, weight decay): the reference's table, under megatron-core's names.
TABLE = {
    "embedding.word_embeddings.weight": (1.0, DECAY),
    "output_layer.weight": (1.0, DECAY),
    "linear_qkv.weight": (SCALE, DECAY),
    "linear_proj.weight": (SCALE, DECAY),
    "linear_fc1.weight": (SCALE, DECAY),
    "linear_fc2.weight": (SCALE, DECAY),
    "linear_qkv.bias": (SCALE, 0.0),
    "linear_proj.bias": (SCALE, 0.0),
    "linear_fc1.bias": (SCALE, 0.0),
    "linear_fc2.bias": (SCALE, 0.0),
    "layernorm.weight": (1.0, 0.0),
    "layernorm.bias": (1.0, 0.0),
}
TO_HF = {
    "word_embeddings": ["wte"],
    "linear_qkv": ["c_attn"],
    "linear_proj": ["attn.c_proj"],
    "linear_fc1": ["c_fc", "c_fc2"],
    "linear_fc2": ["mlp.c_proj"],
    "layernorm": ["ln_1", "ln_2", "ln_f"],
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def groups_at_every_layout() -> dict[str, dict[str, tuple[float, float]]]:
    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training.loop import build
    from megatron.crystalcoder.training.optimizer import parameter_settings
    from megatron.crystalcoder.training.resume import Start

    found = {}
    for tp, pp in LAYOUTS:
        for variant in ("fp32", "distributed", "bf16", "bf16 distributed", "weights only"):
            parallel = ParallelConfig(tp, pp, use_distributed_optimizer="distributed" in variant)
            settings = OptimizerSettings(
                weight_decay=DECAY, hidden_lr_scale=SCALE, scale_hidden_biases=variant != "weights only"
            )
            config = tiny_config(Path(), parallel=parallel, optimizer=settings, bf16="bf16" in variant)
            platform.initialize_model_parallel(parallel)
            model, optimizer = build(config, Start("", cast(Any, tiny_weights())))
            found[f"{variant} {tp} {pp}"] = parameter_settings(model, optimizer)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, tuple[float, float]]]]:
    return cast(Any, run_on_ranks(4, groups_at_every_layout))


@pytest.mark.parametrize("variant", ["fp32", "distributed", "bf16", "bf16 distributed", "weights only"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups(found: list[Any], variant: str, layout: tuple[int, int]) -> None:
    tp, pp = layout
    ranks = [rank[f"{variant} {tp} {pp}"] for rank in found]
    seen = set()
    for parameters in ranks:
        for name, values in parameters.items():
            end = next(end for end in TABLE if name.endswith(end))
            factor, decay = TABLE[end]
            if variant == "weights only" and "linear" in name and name.endswith("bias"):
                factor = 1.0
            assert values == (factor, decay), f"{variant} TP{tp} PP{pp}: {name}"
            seen.add(end)
    assert seen == set(TABLE) - (set() if pp > 1 else {"output_layer.weight"})
    # 4 layers of 12 tensors, the final norm's 2, the embedding and, on another stage, its copy: each on every rank it
    # belongs to; with the distributed optimizer at least one data-parallel rank holds a shard of each.
    if "distributed" not in variant:
        assert sum(map(len, ranks)) == (4 * 12 + 2 + 1 + (pp > 1)) * tp * (4 // (tp * pp))


def test_table_is_the_references(shared: Path) -> None:
    run = json.loads((shared / "fixtures/reference/tiny_train.json").read_text())
    reference = {
        name: (group["lr_mult"], group["wd_mult"] * run["wd"]) for group in run["groups"] for name in group["params"]
    }
    checked = 0
    for end, (factor, decay) in TABLE.items():
        module, kind = end.rsplit(".", 1)
        for hf in TO_HF.get(module.removeprefix("embedding."), []):
            for name, (lr, wd) in reference.items():
                if name.endswith(f"{hf}.{kind}"):
                    assert (lr, wd) == (factor if factor == 1.0 else run["mup_width_scale"], decay), name
                    checked += 1
    assert checked == len(reference)


def test_learning_rate_follows_the_factor() -> None:
    """lr_mult is what `set_learning_rate` multiplies by; an empty scale of 1 makes no group of its own."""
    from types import SimpleNamespace

    from megatron.crystalcoder.training.optimizer import set_learning_rate

    groups: list[dict[str, float]] = [{"lr_mult": 1.0}, {"lr_mult": 0.0625}]
    set_learning_rate(cast(Any, SimpleNamespace(param_groups=groups)), 2e-4)
    assert [group["lr"] for group in groups] == [2e-4, 2e-4 * 0.0625]
    assert replace(OptimizerSettings()).hidden_lr_scale == 1.0
