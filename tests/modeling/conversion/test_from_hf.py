"""``from_hf`` where it does not depend on the family: what it refuses, and activations."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)
from transformers.activations import ACT2FN

from normfree import NormfreeConfig, from_hf
from normfree.errors import InputError
from normfree.modeling.activations import ACTIVATIONS
from normfree.modeling.conversion.options import HF_ACTIVATIONS
from tests.modeling.conversion.checks import VOCAB, assert_same, tokens
from tests.modeling.conversion.test_gpt2 import TestGPT2 as FamilyGPT2
from tests.modeling.conversion.test_gpt_neox import TestGPTNeoX as FamilyGPTNeoX
from tests.modeling.conversion.test_llama import TestLlama as FamilyLlama


def gpt2() -> GPT2LMHeadModel:
    return FamilyGPT2.build()


def gpt_neox() -> GPTNeoXForCausalLM:
    return FamilyGPTNeoX.build()


def llama() -> LlamaForCausalLM:
    return FamilyLlama.build()


def test_conversion_draws_no_random_numbers() -> None:
    theirs = gpt2()
    state = torch.get_rng_state()
    from_hf(theirs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(HF_ACTIVATIONS))
def test_activation_names_stand_for_the_same_function(name: str) -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float32)
    config = NormfreeConfig(activation=HF_ACTIVATIONS[name])
    ours = ACTIVATIONS[HF_ACTIVATIONS[name]](config)
    torch.testing.assert_close(ours(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


def test_other_classes_are_refused_by_name() -> None:
    sizes = {"d_model": 8, "decoder_attention_heads": 2, "decoder_layers": 1, "decoder_ffn_dim": 8}
    bart = BartForCausalLM(BartConfig(vocab_size=8, **sizes))
    allowed = "allowed: GPT2LMHeadModel, .*GPTNeoXForCausalLM, LlamaForCausalLM, .*Qwen3ForCausalLM"
    with pytest.raises(InputError, match=f"cannot convert a BartForCausalLM; {allowed}"):
        from_hf(bart)
    with pytest.raises(InputError, match=f"cannot convert a GPT2Model; {allowed}"):
        from_hf(gpt2().transformer)
    with pytest.raises(InputError, match="cannot convert a NormfreeForCausalLM"):
        from_hf(from_hf(gpt2()))

    class ChangedLlama(LlamaForCausalLM):
        """A subclass may compute anything."""

    changed = ChangedLlama(llama().config)
    with pytest.raises(InputError, match="cannot convert a ChangedLlama"):
        from_hf(changed)
    ChangedLlama.__name__ = "LlamaForCausalLM"
    with pytest.raises(InputError, match=f"cannot convert a LlamaForCausalLM of {__name__}"):
        from_hf(changed)


def test_weights_that_are_not_the_architectures_own_are_refused() -> None:
    with_adapter = llama()
    with_adapter.model.layers[1].mlp.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"model\.blocks\.1\.ffn\.adapter\.bias"):
        from_hf(with_adapter)
    biased_head = gpt2()
    biased_head.lm_head = torch.nn.Linear(16, VOCAB)
    with pytest.raises(InputError, match=r"without a counterpart: lm_head\.bias"):
        from_hf(biased_head)
    mixed = gpt_neox()
    mixed.gpt_neox.final_layer_norm.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"one dtype on one device; it has torch\.bfloat16, torch\.float32 on cpu"):
        from_hf(mixed)
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    with pytest.raises(InputError, match=r"it has torch\.float32 on meta"):
        from_hf(empty)


def test_embeddings_untied_by_hand_stay_untied() -> None:
    theirs = gpt2()
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone() + 1)
    ours = from_hf(theirs)
    assert not ours.config.tie_word_embeddings
    assert_same(ours(tokens()).logits, theirs(tokens()).logits)
