"""Attention implementations against each other and the biases against their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normfree import EntropyProbe, NormfreeConfig, NormfreeForCausalLM
from normfree.entropy import compiled_attention
from normfree.errors import InputError
from normfree.modeling.attention import BIASED_PROJECTIONS

from . import reference

SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary-grouped": {"position": "rotary", "n_kv_head": 2, "norm": "none"},
}


def build(**options: Any) -> NormfreeForCausalLM:
    return reference.perturb(NormfreeForCausalLM(NormfreeConfig(**{**SIZES, **options})), std=0.05).eval()


def left_padded() -> torch.Tensor:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    return mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_implementations_agree_with_sdpa(implementation: str, variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = torch.randint(19, (2, 13))
    assert model.config._attn_implementation == "sdpa"
    whole, padded = model(ids).logits, model(ids, attention_mask=left_padded()).logits
    model.set_attn_implementation(implementation)
    kept = left_padded().bool()
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes a quarter of a minute
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-5)
        actual = model(ids, attention_mask=left_padded()).logits
    torch.testing.assert_close(actual[kept], padded[kept], rtol=0, atol=1e-5)


@pytest.mark.skipif(compiled_attention.refuses() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_attention_trains_as_eager_does(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and the probe's readings; and what it does not take is left to sdpa."""
    model, ids = build(**VARIANTS[variant], attention_dropout=0.1), torch.randint(19, (2, 13))
    calls: list[torch.Tensor] = []
    kernel = compiled_attention.causal_attention

    def counted(q: torch.Tensor, *args: Any) -> compiled_attention.Attended:
        calls.append(q)
        return kernel(q, *args)

    monkeypatch.setattr(compiled_attention, "causal_attention", counted)

    def read(implementation: str) -> tuple[torch.Tensor, ...]:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with EntropyProbe(model, count_nonfinite=True) as probe:
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return loss.detach(), probe.per_head(), probe.per_position(), probe.sink_share(), probe.maximum(), *gradients

    fast, n_call = read("sdpa"), len(calls)
    assert n_call == model.config.n_layer
    torch.testing.assert_close(fast, read("eager"), rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("sdpa")
    model.train()(ids)  # attention dropout
    model.eval()(ids, attention_mask=left_padded())
    model(ids[:, :1])
    assert len(calls) == n_call
    model.double()(ids)
    assert len(calls) == n_call
    for half in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", half):
            model.float()(ids)
    assert len(calls) == 3 * n_call


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_kernels_short_bf16_sequences_train_eagerly(
    variant: str, without_libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients and entropies of eager attention, bit for bit; no sdpa of torch, slow backwards in bf16."""
    model, ids = build(**VARIANTS[variant]), torch.randint(19, (2, 13))

    def read(implementation: str) -> tuple[torch.Tensor, ...]:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with EntropyProbe(model) as probe, torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), probe.per_head(), *(each.grad for each in model.parameters() if each.grad is not None)

    expected = read("eager")
    calls: list[int] = []
    torch_sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return torch_sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(read("sdpa"), expected, rtol=0, atol=0)
    assert not calls
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert len(calls) == model.config.n_layer


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_soft_caps_are_the_same_in_flex_attention(variant: str) -> None:
    model = build(**VARIANTS[variant], attn_logit_softcapping=0.3)
    assert model.config._attn_implementation == "eager"
    ids, kept = torch.randint(19, (2, 13)), left_padded().bool()
    expected = model(ids, attention_mask=left_padded()).logits[kept]
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        actual = model(ids, attention_mask=left_padded()).logits[kept]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_soft_caps_are_refused_where_an_implementation_has_none(tmp_path: Path) -> None:
    message = "attention implementation 'sdpa' cannot soft-cap scores"
    model = build(attn_logit_softcapping=0.3)
    with pytest.raises(InputError, match=message):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert NormfreeForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "eager"
    with pytest.raises(InputError, match=message):
        NormfreeForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(InputError, match=message):
        model(torch.randint(19, (2, 13)))


@torch.no_grad()
def test_eager_attention_weights_are_causal_distributions() -> None:
    model = build()
    model.set_attn_implementation("eager")
    attentions = model(torch.randint(19, (2, 13)), output_attentions=True).attentions
    assert [each.shape for each in attentions] == [(2, 4, 13, 13)] * 2
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 13))
        assert torch.equal(weights, weights.tril())
        assert (weights.tril().sum((0, 1)) > 0).equal(torch.ones(13, 13).tril().bool())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing_for_the_tokens_before_it(variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = torch.randint(19, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :9], model(ids[1:, :9]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [*BIASED_PROJECTIONS, True, False])
def test_attention_bias_names_the_biases(bias: str | bool) -> None:
    named = {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo", True: "qkvo", False: ""}[bias]
    model = build(attention_bias=bias)
    biases = {name for name in model.state_dict() if ".attention." in name and name.endswith(".bias")}
    expected = {f"model.blocks.{layer}.attention.{each}_proj.bias" for layer in range(2) for each in named}
    assert biases == expected


@pytest.mark.parametrize("mlp_bias", [True, False])
@pytest.mark.parametrize(("ffn", "projections"), [("dense", ["down", "up"]), ("gated", ["down", "gate", "up"])])
def test_mlp_bias_names_the_biases(ffn: str, projections: list[str], mlp_bias: bool) -> None:
    layer = build(ffn=ffn, mlp_bias=mlp_bias).model.blocks[0].ffn.state_dict()
    weights = sorted(name for name in layer if name.endswith("weight"))
    biases = sorted(name for name in layer if name.endswith("bias"))
    assert weights == [f"{each}_proj.weight" for each in projections]
    assert biases == ([f"{each}_proj.bias" for each in projections] if mlp_bias else [])
