"""params.yaml: the three 7B files say what the reference ran, and a wrong file is refused with its line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_prep.errors import InputError
from megatron.crystalcoder.data.mixture import MixtureOrder, Source
from megatron.crystalcoder.model.config import MuP
from megatron.crystalcoder.model.initialization import Normal, Uniform
from megatron.crystalcoder.training.config import DataSettings, MixtureEntry, ScheduleSegment
from megatron.crystalcoder.training.evaluation import evaluation_names
from megatron.crystalcoder.training.params import Params, ReferenceCompat, default_micro_batch_size, load_params
from megatron.crystalcoder.training.params_schema import ParamsSchema
from megatron.crystalcoder.training.schedules import learning_rate
from megatron.crystalcoder.training.widths import at_width

SLIMPAJAMA = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
TENTH = ((0.0, 0.1),)


@pytest.fixture(scope="module")
def phases(repo_root: Path) -> dict[int, Params]:
    return {phase: load_params(repo_root / f"params/phase{phase}/params.yaml") for phase in (1, 2, 3)}


@pytest.fixture(scope="module")
def tiny_path(repo_root: Path) -> Path:
    return repo_root / "params/tiny/phase1.yaml"


def test_all_phases_train_the_7b_model(phases: dict[int, Params]) -> None:
    """Sizes, muP constants, optimizer and initial weights, number by number. Planted: filter_size 10920, fails."""
    for phase, params in phases.items():
        config = params.train_config(dp_size=16)
        model = config.model
        assert model.num_parameters == 6_575_278_720
        assert (model.hidden_size, model.num_layers, model.num_attention_heads) == (4096, 32, 32)
        assert (model.ffn_hidden_size, model.vocab_size, model.rotary_dim) == (10922, 32032, 32)
        assert (model.max_sequence_length, model.layernorm_epsilon, model.tie_word_embeddings) == (2048, 1e-5, True)
        assert model.rotary_percent == 0.25
        assert model.mup == MuP(0.0625, 2.22, 14.6, scale_qk_dot_by_d=True)
        assert model.mup.output_scale == 0.13875
        optimizer = config.optimizer
        assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-9)
        assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
        assert (optimizer.hidden_lr_scale, optimizer.scale_hidden_biases) == (0.0625, False)
        assert (config.loss_reduction, config.loss_weight) == ("sequence", 1 / 2048)
        assert (config.global_batch_size, config.seq_length, config.bf16, config.seed) == (2112, 2048, True, 1)
        assert config.train_iters == {1: 79_721, 2: 214_387, 3: 27_728}[phase]
        assert config.save_interval == {1: 1_500, 2: 1_500, 3: 1_000}[phase]
        assert params.values.runconfig.eval_steps == {1: 373, 2: 382, 3: 19_375}[phase]
        init = params.init_settings()
        assert init.embedding == Normal(0.073, -0.146, 0.146)
        assert init.hidden == Normal(0.01825, -0.0365, 0.0365)
        assert init.output == Normal(0.00228125, -0.0045625, 0.0045625)
        assert params.init_seed == 1
        assert config.finetune  # weights alone are taken from checkpoint_path


def test_schedules_of_the_three_phases(phases: dict[int, Params]) -> None:
    """The rate at the steps around each warm-up's end and at the last one, against the formula written out.

    Planted: the second piece counted from step 0; `decay_steps` of phase 3 dropped: both fail.
    """
    peaks = {
        1: (0.012, 0.00012408, 86, 294_337),
        2: (0.0087825, 0.00013679, 86, 214_301),
        3: (0.002, 0.0002, 276, 27_452),
    }
    for phase, (peak, end, warmup, decay) in peaks.items():
        config = phases[phase].train_config()
        assert config.schedule.segments == (  # type: ignore[union-attr]
            ScheduleSegment("Linear", 0.0, peak, warmup),
            ScheduleSegment("Linear", peak, end, decay),
        )

        def rate(step: int, config: Any = config) -> float:
            return learning_rate(config.schedule, step=step, samples=step * 2112)

        for step in (0, 1, 85, 86, 87, 275, 276, 277, config.train_iters - 1, warmup + decay, warmup + decay + 1000):
            expected = (
                peak * step / warmup if step < warmup else max(end, peak - (peak - end) * (step - warmup) / decay)
            )
            assert rate(step) == pytest.approx(expected, rel=1e-12)
        assert rate(0) == 0.0
    phase1 = phases[1].train_config().schedule
    assert learning_rate(phase1, step=79_720, samples=0) == pytest.approx(0.0087869, abs=5e-8)  # still high at its end


def test_mixtures_of_the_three_phases(phases: dict[int, Params]) -> None:
    """Directories below the root, weights digit by digit, subsets where the reference has them."""
    one = (0.043251179622600486, 0.0413121881861869, 0.2665010054745754, 0.5334581653397988, 0.04962588209760537,
           0.03168034115317788, 0.03417123812605512)  # fmt: skip
    two = (0.016083857723861224, 0.015358576352403003, 0.09909981505117808, 0.1983897689052003, 0.018454606218343703,
           0.011784941022274698, 0.012710859995188247)  # fmt: skip
    slim = Path("/d/SlimPajama")
    expected_1 = tuple(
        MixtureEntry(slim / f"{name}_train_packed_part0of2", w) for name, w in zip(SLIMPAJAMA, one, strict=True)
    )
    expected_2 = tuple(
        MixtureEntry(slim / f"{name}_train_packed_part1of2", w) for name, w in zip(SLIMPAJAMA, two, strict=True)
    )
    expected_2 += (MixtureEntry(Path("/d/StarCoder_fim_shuffled"), 0.6281175747315507),)
    stage3 = Path("/d/stage3_fim_0.3/train_shuffled_correct_ratio")
    expected_3 = (
        MixtureEntry(stage3 / "css", 0.08792775542527535),
        MixtureEntry(stage3 / "javascript", 0.18370762129027085),
        MixtureEntry(stage3 / "html", 0.18536747298179254),
        MixtureEntry(stage3 / "python", 0.34270089587947816),
        MixtureEntry(slim / "ArXiv_train_packed", 0.016663255966286664, TENTH),
        MixtureEntry(slim / "Book_train_packed", 0.00831444671835677, TENTH),
        MixtureEntry(slim / "C4_train_packed", 0.01685693658811707, TENTH),
        MixtureEntry(slim / "CommonCrawl_train_packed", 0.058282893778895735, TENTH),
        MixtureEntry(slim / "StackExchange_train_packed", 0.008379821974060706, TENTH),
        MixtureEntry(slim / "Wikipedia_train_packed", 0.05835852419497722, TENTH),
        MixtureEntry(Path("/d/StarCoder_fim_train_shuffled"), 0.0334403752024888, TENTH),
    )
    for phase, expected in ((1, expected_1), (2, expected_2), (3, expected_3)):
        data = phases[phase].train_config(data_root=Path("/d")).data
        assert data.mixture == expected
        assert (data.order, data.seed, data.num_workers, data.paths) == ("mixture", 1, 1, ())


def test_proportions_of_10000_batches(phases: dict[int, Params]) -> None:
    """Each phase's datasets, of any lengths: 21 million samples, within 0.1 % of the normalised weights."""
    for phase, params in phases.items():
        lengths = np.random.default_rng(phase).integers(1_000_000, 50_000_000, 20).tolist()
        mixture, start, sources = params.train_config().data.mixture, 0, []
        for entry, length in zip(mixture, lengths, strict=False):
            sources.append(Source(entry.weight, ((start, start + length),)))
            start += length
        drawn = np.array(MixtureOrder(tuple(sources), seed=1).drawn(10_000 * 2112))
        weights = np.array([entry.weight for entry in mixture])
        assert np.abs(drawn / drawn.sum() - weights / weights.sum()).max() < 1e-3
        assert drawn.sum() == 10_000 * 2112


def test_evaluation_follows_the_mode(phases: dict[int, Params]) -> None:
    """One entry a directory, in order; eval_steps x batch 32, rounded up to global batches; off in mode train."""
    assert phases[3].train_config().eval_data == ()
    assert phases[3].train_config().eval_interval == 0
    config = phases[3].train_config(mode="train_and_eval")
    assert [settings.paths[0].name for settings in config.eval_data] == [
        "css", "javascript", "html", "python", "slimpj_arxiv_val_packed", "slimpj_book_val_packed",
        "slimpj_c4_val_packed", "slimpj_commoncrawl_val_packed", "slimpj_stackexchange_val_packed",
        "slimpj_wikipedia_val_packed",
        "StarCoder_fim_val",
    ]  # fmt: skip
    assert {settings.order for settings in config.eval_data} == {"single"}
    assert (config.eval_interval, config.eval_iters) == (1_000, 294)
    assert phases[1].train_config(mode="eval").eval_iters == 6  # 373 x 32 = 11,936 <= 6 x 2112


def test_the_files_tell_the_values_of_the_reference_key_by_key(phases: dict[int, Params]) -> None:
    """What only a CS-2 reads, which no other test sees: it is in the files too."""
    for phase, params in phases.items():
        raw = params.file.values
        assert raw["model"].get("attention_softmax_fp32") is (True if phase < 3 else None)
        assert raw["optimizer"].get("loss_scaling_factor") == (1.0 if phase < 3 else None)
        assert raw["runconfig"]["precision_opt_level"] == (1 if phase == 1 else -1)
        assert raw["runconfig"]["is_pretrained_checkpoint"] is (phase == 3)
        assert raw["model"]["attention_kernel"] == "optimized_beta"
        assert raw["model"]["boundary_casting"] is False
        assert raw["optimizer"]["log_summaries"] is raw["runconfig"]["use_cs_grad_accum"] is True
        keys = (
            "repeat",
            "shuffle",
            "num_workers",
            "prefetch_factor",
            "persistent_workers",
            "use_worker_cache",
            "vocab_size",
        )
        assert [raw["train_input"][key] for key in keys] == [True, False, 1, 10, True, False, 32032]
        assert (raw["eval_input"]["batch_size"], raw["eval_input"]["repeat"]) == (32, False)
        for scheduler in raw["optimizer"]["learning_rate"]:
            if phase < 3:
                assert scheduler["learning_rate"] == scheduler["base_lr"] == scheduler["initial_learning_rate"]
                assert scheduler["steps"] == scheduler["decay_steps"]
        assert "runconfig.precision_opt_level" in params.without_effect()
        assert "runconfig.max_steps" not in params.without_effect()


def test_tiny_files_are_the_7b_files_at_another_width(repo_root: Path, phases: dict[int, Params]) -> None:
    """Same keys; muP constants carried by the width: lr x 256/h, logits x 256/h, std x sqrt(256/h)."""
    for phase, large in phases.items():
        tiny = load_params(repo_root / f"params/tiny/phase{phase}.yaml")
        for section in ("model", "optimizer"):
            assert tiny.file.values[section].keys() == large.file.values[section].keys()
        assert tiny.file.values["runconfig"].keys() <= large.file.values["runconfig"].keys() | {"mode"}
        model, mup = tiny.model_config(), tiny.model_config().mup
        width_scale = 256 / model.hidden_size
        assert (mup.width_scale, mup.output_alpha, mup.embeddings_scale) == (width_scale, 2.22, 14.6)
        assert model.head_dim // model.rotary_dim == 4
        init = tiny.init_settings()
        assert init.embedding.std == 0.073
        assert init.hidden.std == pytest.approx(0.073 * width_scale**0.5, rel=1e-4)
        assert init.output.std == pytest.approx(init.hidden.std / (2 * model.num_layers) ** 0.5, rel=1e-3)
        config = tiny.train_config()
        assert config.loss_weight == 1 / config.seq_length
        for tp in (1, 2):
            model.check_layout(tp, 2)
        assert sum(segment.steps for segment in config.schedule.segments) == config.train_iters  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "millions"), [("40m", (37, 42)), ("111m", (107, 114)), ("256m", (250, 262))])
def test_proxies_are_the_7b_model_at_another_width(
    repo_root: Path, phases: dict[int, Params], name: str, millions: tuple[int, int]
) -> None:
    """Everything but width, depth, batch and length is phase 1's or follows from it by muP's rules.

    Planted: the 7B's logit scale; a rate divided by the width: each fails."""
    params, big = load_params(repo_root / f"params/proxy/{name}.yaml"), phases[1]
    config, reference = params.train_config(), big.train_config()
    wider, init = at_width(big, reference, config.model.hidden_size, "mup")
    depth = (32 / config.model.num_layers) ** 0.5
    assert millions[0] < config.model.num_parameters / 1e6 < millions[1]
    assert replace(config.model, num_layers=32) == wider.model
    assert (config.optimizer, config.loss_weight, config.bf16) == (wider.optimizer, reference.loss_weight, True)
    assert params.init_settings().embedding == init.embedding
    assert params.init_settings().hidden.std == pytest.approx(init.hidden.std, rel=1e-7)
    assert params.init_settings().output.std == pytest.approx(init.output.std * depth, rel=1e-7)
    for drawn in (params.init_settings().hidden, params.init_settings().output):
        assert (drawn.a, drawn.b) == pytest.approx((-2 * drawn.std, 2 * drawn.std), rel=1e-7)
    warmup, decay = config.schedule.segments  # type: ignore[union-attr]
    their_warmup, their_decay = reference.schedule.segments  # type: ignore[union-attr]
    assert warmup == their_warmup
    assert (decay.initial, decay.end) == (their_decay.initial, their_decay.end)
    assert warmup.steps + decay.steps == config.train_iters
    tokens = config.train_iters * config.global_batch_size * 2048
    assert tokens / config.model.num_parameters == pytest.approx(20, rel=1e-3)
    assert replace(config.data, seed=1) == reference.data


def test_every_key_of_the_reference_is_accepted(tmp_path: Path, tiny_path: Path) -> None:
    """All runconfig keys that its files hold, as a person would write them."""
    extra = yaml.safe_load(
        """
        {num_epochs: null, num_steps: null, checkpoint_path: null, save_initial_checkpoint: False, save_losses: True,
        precision_opt_level: 1, use_cs_grad_accum: True, is_pretrained_checkpoint: True, num_csx: 16,
        num_workers_per_csx: 1, num_act_servers: 1, num_wgt_servers: 4, mgmt_address: a, mgmt_namespace: b,
        credentials_path: c, debug_args_path: d, dist_addr: "localhost:8888", dist_backend: nccl, init_method: "env://",
        enable_distributed: False, experimental_api: False, job_labels: [x=y], job_time_sec: 60, logging: INFO,
        mode: train, mount_dirs: [/m], python_paths: [/p], service_dir: s, target_device: CSX, use_appliance_data: True,
        validate_only: null, compile_dir: null, compile_only: null, disable_version_check: null, wrk_memory_gi: 100}
        """
    )
    values = yaml.safe_load(tiny_path.read_text())
    values["runconfig"] |= extra
    values["cerebras"] = {"save_iter_state_path": "somewhere"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    idle = load_params(tmp_path / "p.yaml").without_effect()
    assert "runconfig.wrk_memory_gi" in idle
    assert "cerebras.save_iter_state_path" in idle
    assert "runconfig.compile_dir" not in idle  # null says nothing


WRONG = {
    "typo": (
        "  hidden_size: 128",
        "  hiden_size: 128",
        r": unknown key model.hiden_size: did you mean model.hidden_size\?",
    ),
    "typo in a list": (
        "  - data_dir: data/prose",
        "  - data_dirs: data/prose",
        "train_input.mixture.0.data_dirs: did you mean train_input.mixture.0.data_dir",
    ),
    "typo in a scheduler": (
        "    base_lr: 0.0\n",
        "    base_rate: 0.0\n",
        "unknown key optimizer.learning_rate.0.base_rate",
    ),
    "wrong section": (
        "  max_steps",
        "  beta1: 0.9\n  max_steps",
        "unknown key runconfig.beta1: it belongs in optimizer",
    ),
    "wrong top": ("runconfig:", "runconfigs:", "unknown key runconfigs: did you mean runconfig"),
    "text for a number": (
        "  num_heads: 4",
        "  num_heads: four",
        r"model.num_heads should be a valid integer, but is 'four'",
    ),
    "number for a flag": (
        "  shuffle: False",
        "  shuffle: 0",
        "train_input.shuffle should be a valid boolean, but is 0",
    ),
    "flag for a number": ("  seed: 1\n", "  seed: True\n", "runconfig.seed should be a valid integer, but is True"),
    "an infinite rate": (
        "    end_learning_rate: 0.006",
        "    end_learning_rate: .inf",
        "should be a finite number, but is inf",
    ),
    "no weight at all": ("    weight: 0.8", "    weight: .nan", "should be a finite number, but is nan"),
    "zero size": ("  num_hidden_layers: 4", "  num_hidden_layers: 0", "greater than 0, but is 0"),
    "another activation": (
        "nonlinearity: swiglu",
        "nonlinearity: gelu",
        "model.nonlinearity should be swiglu, but is 'gelu'",
    ),
    "dropout": ("\n  dropout_rate: 0.0", "\n  dropout_rate: 0.1", r"model.dropout_rate should be 0, but is 0.1"),
    "missing": ("  num_heads: 4\n", "", r":\d+: model.num_heads is missing"),
    "negative weight": ("weight: 0.8", "weight: -0.8", "train_input.mixture.0.weight .*-0.8"),
    "zero weight": ("weight: 0.8", "weight: 0", "train_input.mixture.0.weight is 0, so data/prose is never drawn"),
    "heads": ("  num_heads: 4", "  num_heads: 3", "model.num_heads 3 does not divide hidden_size 128"),
    "rotary": ("  rotary_dim: 8", "  rotary_dim: 64", "model.rotary_dim 64 must be even and at most the head size, 32"),
    "vocabularies": (
        "  vocab_size: 4224\n  repeat: True",
        "  vocab_size: 32\n  repeat: True",
        "train_input.vocab_size 32 differs from model.vocab_size 4224",
    ),
    "subset": ("    weight: 0.8", "    weight: 0.8\n    data_subset: 0.5-0.1", "data_subset '0.5-0.1'"),
    "two sources": ("  mixture:", "  data_dir: x\n  mixture:", "train_input needs either data_dir or mixture"),
    "fp16": ("use_bfloat16: False", "use_bfloat16: False\n  mixed_precision: True", "is given twice"),
    "no end": ("    end_learning_rate: 0.006\n", "", r"optimizer.learning_rate.0 Linear has no end"),
    "no bounds": ("a: -0.20648, b: 0.20648", "a: -0.20648", "model.initializer truncated_normal needs its bounds"),
    "glu": ("scale_glu_initialization: True", "scale_glu_initialization: False", "pass --reference-init to have that"),
    "power": ("    steps: 15\n", "    steps: 15\n    power: 2.0\n", "power belongs to Polynomial, not to Linear"),
    "no decay rate": ("  - scheduler: Linear", "  - scheduler: Exponential", "Exponential has no decay_rate"),
    "no values": (
        "  - scheduler: Linear",
        "  - scheduler: PiecewiseConstant",
        "needs values, one more than boundaries",
    ),
    "not yaml": ("model:", "model: [", "not valid YAML"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, tiny_path: Path, fault: str) -> None:
    """One line: file, line, key, remedy. Planted: extra="ignore"; strict=False: both fail."""
    old, new, message = WRONG[fault]
    text = tiny_path.read_text()
    assert old in text
    path = tmp_path / "p.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        load_params(path)
    assert "\n" not in str(caught.value)
    place = str(caught.value).split(": ")[0]
    assert place.startswith(f"{path}:")
    if fault not in (
        "missing",
        "not yaml",
        "no end",
        "two sources",
        "power",
        "no decay rate",
        "no values",
    ):  # those name the section's line
        line = int(place.rsplit(":", 1)[1])
        assert (
            path.read_text().splitlines()[line - 1].strip() in {part.strip() for part in new.splitlines()}
            or new in path.read_text().splitlines()[line - 1]
        )


def test_overrides_change_values_and_are_checked_alike(tiny_path: Path) -> None:
    """key.path=value, list items by number, YAML values; mistakes point at the override."""
    params = load_params(
        tiny_path,
        [
            "runconfig.max_steps=7",
            "train_input.mixture.1.data_dir=elsewhere",
            "optimizer.eps=1e-7",
            "runconfig.eval_frequency=2",
            "model.share_embedding_weights=false",
            "optimizer.learning_rate=0.001",
            "train_input.shuffle=true",
        ],
    )
    config = params.train_config(data_root=Path("root"))
    assert (config.train_iters, config.optimizer.adam_eps, config.model.tie_word_embeddings) == (7, 1e-7, False)
    assert config.data.mixture[1].data_dir == Path("root/elsewhere")
    assert config.data.order == "shuffled"
    assert config.schedule.segments == (ScheduleSegment("Constant", 0.001, 0.001, 0),)  # type: ignore[union-attr]
    assert learning_rate(config.schedule, step=5, samples=0) == 0.001
    for wrong, message in (
        ("runconfig.max_step=7", r"override 'runconfig.max_step=7': unknown key .*max_steps"),
        ("runconfig.max_steps=x", r"override 'runconfig.max_steps=x': runconfig.max_steps should be a valid integer"),
        ("runconfig.max_steps", "key.path=value"),
        ("run.max_steps=7", "no section 'run'"),
        ("train_input.mixture.9.weight=1", "list of 2"),
        ("runconfig.max_steps.a=1", "one value, not a section"),
    ):
        with pytest.raises(InputError, match=message):
            load_params(tiny_path, [wrong])


def test_arguments_win_over_the_file(tiny_path: Path) -> None:
    config = load_params(tiny_path, ["runconfig.checkpoint_path=old"]).train_config(
        model_dir=Path("new"), checkpoint_path=Path("weights"), micro_batch_size=2
    )
    assert (config.save, config.load, config.micro_batch_size) == (Path("new"), Path("weights"), 2)
    assert load_params(tiny_path, ["runconfig.checkpoint_path=old"]).train_config().load == Path("old")
    assert load_params(tiny_path, ["model.loss_scaling=num_tokens"]).train_config().loss_reduction == "token"


def test_the_default_micro_batch_divides_each_ranks_share() -> None:
    assert default_micro_batch_size(2112, 16, 2048) == 2
    assert default_micro_batch_size(8, 1, 256) == 8
    assert default_micro_batch_size(30, 2, 512) == 5
    assert default_micro_batch_size(7, 1, 100_000) == 1


def test_piecewise_constant_rates(tiny_path: Path) -> None:
    """values and boundaries, alone and before another scheduler. Planted: a boundary's step given the old value, fails.

    Boundaries that do not rise are refused."""
    piece = "{scheduler: PiecewiseConstant, values: [0.1, 0.2, 0.3], boundaries: [5, 9], steps: 12}"
    linear = "{scheduler: Linear, initial_learning_rate: 1.0, end_learning_rate: 0.0, steps: 10}"
    for text, last in ((f"[{piece}]", 0.3), (f"[{piece}, {linear}]", 0.9)):
        schedule = load_params(tiny_path, [f"optimizer.learning_rate={text}"]).schedule()
        rates = [learning_rate(schedule, step=step, samples=0) for step in (0, 4, 5, 8, 9, 11, 13)]
        assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, last])
    with pytest.raises(InputError, match="boundaries must rise"):
        load_params(tiny_path, [f"optimizer.learning_rate=[{piece.replace('[5, 9]', '[9, 5]')}]"])


def test_the_references_choices_are_options(tiny_path: Path) -> None:
    """Each switch moves its own setting and no other; in its order a missing `shuffle` means True, as there."""
    plain = load_params(tiny_path).train_config()
    for reference, moved in (
        (ReferenceCompat(order=True), "data"),
        (ReferenceCompat(adam=True), "optimizer"),
        (ReferenceCompat(init=True), None),
    ):
        params = load_params(tiny_path, reference=reference)
        config = params.train_config()
        changed = {field.name for field in fields(config) if getattr(config, field.name) != getattr(plain, field.name)}
        assert changed == ({moved} if moved else set())
        assert params.init_settings().gate_bias == (Uniform(128**-0.5) if reference.init else None)
    glu = load_params(tiny_path, ["model.scale_glu_initialization=false"], ReferenceCompat(init=True))
    assert glu.init_settings().gate == Uniform(128**-0.5)
    data = load_params(tiny_path, reference=ReferenceCompat(order=True)).train_config().data
    assert (data.reference_order, data.order) == (True, "mixture")


def test_a_weight_of_zero_is_the_references_alone(tiny_path: Path) -> None:
    """Refused by its line (see WRONG); with the reference's order its effect there is reproduced."""
    overrides = ["train_input.mixture.1.weight=0"]
    with pytest.raises(InputError, match=r"override .train_input.mixture.1.weight=0.: .*data/code is never drawn"):
        load_params(tiny_path, overrides)
    params = load_params(tiny_path, overrides, ReferenceCompat(order=True))
    assert params.train_config().data.mixture[1].weight == 0


def test_each_evaluation_set_has_a_name_of_its_own() -> None:
    """Two of one name would leave one loss in the mean. Planted: the last part of the path alone, fails."""
    one, two, three = (DataSettings(paths=(Path(path),)) for path in ("a/val", "b/val", "a/code"))
    mixed = DataSettings(mixture=(MixtureEntry(Path("x"), 1.0), MixtureEntry(Path("y"), 1.0)))
    assert evaluation_names([one, two, three, mixed]) == ["a/val", "b/val", "code", "x + y"]
    assert evaluation_names([one, three, one]) == ["a/val #1", "code", "a/val #3"]


def test_a_missing_file_and_one_that_is_no_params_file(tmp_path: Path) -> None:
    for content, message in (
        (None, "cannot be read"),
        ("", "no sections"),
        ("[1]", "no sections"),
        ("a: 1\na: 2", "p.yaml:2: a is given twice"),
    ):
        path = tmp_path / "p.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_params(path)


def test_no_key_is_both_obeyed_and_listed_as_idle() -> None:
    """The schema's own consistency: every section's keys are spelled once, and NoEffect marks stay readable."""
    assert list(ParamsSchema.model_fields) == [
        "train_input",
        "eval_input",
        "model",
        "optimizer",
        "runconfig",
        "cerebras",
    ]
