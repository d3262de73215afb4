"""The model on weights of our own: against the formulas in fp64, and against itself in its other ways of running."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from CrystalCoder import CrystalCoderConfig, CrystalCoderLMHeadModel
from support.reference_model import TINY, random_weights, reference_logits

IMPLEMENTATIONS = ["sdpa", "eager"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    """Whether two computations agree up to fp32 noise; the logits here spread over about 5."""
    return bool((a.double() - b.double()).abs().max() <= tolerance)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_logits_and_gradients_follow_the_formulas(own_model: Any, tokens: torch.Tensor, attention: str) -> None:
    """Planted: half-split rotary, 1/sqrt(d), gate and linear swapped, only their biases swapped, bf16 rotary angles, an
    untied head (its gradient misses the output side): each fails.
    """
    own_model.set_attn_implementation(attention)
    weights = {name: w.double().requires_grad_() for name, w in random_weights(TINY, seed=1).items()}
    expected = reference_logits(weights, TINY, tokens)
    logits = own_model(tokens).logits
    assert close(logits, expected)

    for each in (expected, logits):
        torch.nn.functional.cross_entropy(each[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in own_model.named_parameters():
        true = weights[name].grad
        assert true is not None
        assert float((parameter.grad - true).norm() / true.norm()) < 1e-4, name


def test_the_loss_is_the_mean_over_labelled_tokens(own_model: Any, tokens: torch.Tensor) -> None:
    labels = tokens.clone()
    labels[0, :30] = -100
    logits = own_model(tokens).logits[:, :-1]
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, -1)
    mean = ce[labels[:, 1:] != -100].mean()
    assert close(own_model(tokens, labels=labels).loss, mean, 1e-5)


def test_logits_to_keep(own_model: Any, tokens: torch.Tensor) -> None:
    everything = own_model(tokens).logits
    assert close(own_model(tokens, logits_to_keep=3).logits, everything[:, -3:])
    assert close(own_model(tokens, logits_to_keep=torch.tensor([5, 7])).logits, everything[:, [5, 7]])


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_the_cache_changes_nothing(own_model: Any, tokens: torch.Tensor, attention: str) -> None:
    """A prompt in two pieces, then token by token, with the growing cache and with one of fixed size."""
    own_model.set_attn_implementation(attention)
    expected = own_model(tokens).logits
    for cache in (None, StaticCache(config=own_model.config, max_cache_len=48)):
        pieces = []
        for piece in tokens.split([7, 11, *[1] * 22], dim=1):
            output = own_model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        assert close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(own_model: Any, tokens: torch.Tensor, attention: str, side: str) -> None:
    """Rows of 40, 23 and 9 tokens in one batch have the logits that they have alone, as whole and with a cache.

    Planted: the mask dropped -> fails for left padding. Positions from 0 whatever the mask -> passes, as rotary is
    relative: `test_positions_count_unmasked_tokens` is there for that.
    """
    own_model.set_attn_implementation(attention)
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    lengths = (40, 23, 9)
    spans = [slice(40 - n, 40) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        padded[row, span], mask[row, span] = tokens[row, :n], 1
    whole = own_model(padded, attention_mask=mask).logits
    start = own_model(padded[:, :35], attention_mask=mask[:, :35], use_cache=True)
    rest = own_model(padded[:, 35:], attention_mask=mask, past_key_values=start.past_key_values).logits
    for row, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        alone = own_model(tokens[row : row + 1, :n]).logits[0]
        assert close(whole[row, span], alone)
        assert close(torch.cat([start.logits, rest], dim=1)[row, span], alone)


def test_positions_count_unmasked_tokens(own_model: Any, tokens: torch.Tensor) -> None:
    """The positions that the layers get, from a mask, from a cache, and as given.

    Planted: positions from 0 whatever the mask -> fails.
    """
    seen = []
    own_model.transformer.h[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    past = own_model(tokens[:2, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    own_model(tokens[:2, 3:4], attention_mask=mask, past_key_values=past)
    own_model(tokens[:2, :2], position_ids=torch.tensor([[5, 6]]))
    assert seen == [[[0, 0, 0], [0, 1, 2]], [[1], [3]], [[5, 6]]]


def test_left_padded_generation(own_model: Any, tokens: torch.Tensor) -> None:
    """A batch of prompts of different lengths continues as each does alone."""
    lengths = (12, 7, 3)
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, n in enumerate(lengths):
        padded[row, 12 - n :], mask[row, 12 - n :] = tokens[row, :n], 1
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = own_model.generate(padded, attention_mask=mask, **options)[:, 12:]
    for row, n in enumerate(lengths):
        prompt = tokens[row : row + 1, :n]
        alone = own_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, n:]
        assert batch[row].tolist() == alone.tolist()


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_padding_free(own_model: Any, tokens: torch.Tensor, attention: str) -> None:
    """Sequences end to end in one row, told apart by positions that start again, do not see each other."""
    own_model.set_attn_implementation(attention)
    lengths = (13, 20, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = own_model(tokens[:1], position_ids=positions, use_cache=False).logits
    alone = [own_model(piece).logits for piece in tokens[:1].split(lengths, dim=1)]
    assert close(logits, torch.cat(alone, dim=1))


def test_embeddings_in_place_of_ids(own_model: Any, tokens: torch.Tensor) -> None:
    embedded = own_model.get_input_embeddings()(tokens)
    assert close(own_model(inputs_embeds=embedded).logits, own_model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one"):
        own_model(tokens, inputs_embeds=embedded)


def test_hidden_states_and_attentions(own_model: Any, tokens: torch.Tensor) -> None:
    own_model.set_attn_implementation("eager")
    output = own_model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == TINY.num_layers + 1
    assert close(output.hidden_states[-1], own_model.transformer(tokens).last_hidden_state)
    assert [a.shape for a in output.attentions] == [(3, TINY.num_attention_heads, 40, 40)] * TINY.num_layers
    assert close(output.attentions[0].sum(-1), torch.ones(3, TINY.num_attention_heads, 40))
    assert close(own_model(tokens, return_dict=False)[0], output.logits)


def test_nothing_is_kept_that_nobody_asked_for(own_model: Any, tokens: torch.Tensor) -> None:
    """Without gradients one layer's output is alive at a time; of a long prompt, all of them are gigabytes.

    Planted: hidden states collected always, fails.
    """
    alive: list[weakref.ref] = []
    for block in own_model.transformer.h:
        block.register_forward_hook(lambda *of: alive.append(weakref.ref(of[2][0])))
    gone: list[bool] = []
    own_model.transformer.ln_f.register_forward_hook(lambda *_: gone.extend(ref() is None for ref in alive[:-1]))
    with torch.no_grad():
        own_model(tokens)
    assert gone == [True] * (TINY.num_layers - 1) != []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(own_model: Any, tokens: torch.Tensor, use_reentrant: bool) -> None:
    """The same gradients with and without."""
    own_model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            own_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        own_model.zero_grad()
        own_model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in own_model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_dropout_is_honoured(own_config: CrystalCoderConfig, tokens: torch.Tensor) -> None:
    for option in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        config = CrystalCoderConfig(**{**own_config.to_dict(), option: 0.5})
        model = CrystalCoderLMHeadModel(config).train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits), option
        model.eval()
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_bf16_follows_fp32(own_model: Any, tokens: torch.Tensor) -> None:
    """bf16 keeps 8 bits: logits within 5% of their spread; and rotary angles stay fp32 after `.to`."""
    expected = own_model(tokens).logits
    logits = own_model.to(torch.bfloat16)(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert float((logits.float() - expected).std() / expected.std()) < 0.05


def test_new_models_start_as_mup_asks(own_config: CrystalCoderConfig) -> None:
    """Standard deviations of every kind of matrix; biases 0; norms 1 and 0; one tensor for embedding and head.

    Planted: no muP factor -> 0.02 where 0.01 is due, fails; no 1/sqrt(2 layers) on the residual writers -> fails.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(own_config)
    assert isinstance(model, CrystalCoderLMHeadModel)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, weight in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert torch.equal(weight, torch.full_like(weight, float("ln_" in name and name.endswith("weight")))), name
            continue
        std = 0.02 if "wte" in name else 0.02 * TINY.mup.width_scale**0.5
        if "c_proj" in name:
            std /= (2 * TINY.num_layers) ** 0.5
        assert float(weight.std()) == pytest.approx(std, rel=0.05), name


def test_an_untied_head_is_possible(own_config: CrystalCoderConfig) -> None:
    own_config.tie_word_embeddings = False
    model = CrystalCoderLMHeadModel(own_config)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert len(list(model.parameters())) == 14 * TINY.num_layers + 4


def test_the_bare_decoder(own_config: CrystalCoderConfig) -> None:
    assert type(AutoModel.from_config(own_config)).__name__ == "CrystalCoderModel"


def test_the_7b_configuration(repo_root: Any) -> None:
    """The packaged config.json is the class's defaults, and counts 6,575,278,720 parameters."""
    config = CrystalCoderConfig.from_pretrained(repo_root / "Megatron-LM/CrystalCoder")
    ours = {
        key: value for key, value in config.to_dict().items() if key not in ("architectures", "transformers_version")
    }
    assert ours.items() <= CrystalCoderConfig().to_dict().items()
    assert config.output_scale == pytest.approx(0.13875)
    with torch.device("meta"):
        model = CrystalCoderLMHeadModel(config)
    assert sum(p.numel() for p in model.parameters()) == 6_575_278_720


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation_function": "gelu"},
        {"position_embedding_type": "alibi"},
        {"reorder_and_upcast_attn": True},
        {"n_head": 5},
        {"rotary_dim": 3},
    ],
)
def test_other_architectures_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"CrystalCoder|divisible|rotary_dim"):
        CrystalCoderConfig(**wrong)


def test_null_sizes_have_their_meaning() -> None:
    config = CrystalCoderConfig(n_embd=64, n_head=4, n_inner=None, rotary_dim=None)
    assert (config.n_inner, config.rotary_ndims) == (256, 16)
