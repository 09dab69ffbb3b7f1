"""``from_hf`` against Hugging Face's own forward pass, generation and parameter counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf
from normfree.errors import InputError
from normfree.modeling.activations import ACTIVATIONS
from normfree.modeling.conversion.options import HF_ACTIVATIONS

VOCAB, LENGTH = 43, 12


def gpt2(**options: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return perturbed(GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **options})))


def gpt_neox(**options: Any) -> GPTNeoXForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
    }
    return perturbed(GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **options})))


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return perturbed(LlamaForCausalLM(LlamaConfig(**{**sizes, **options})))


def qwen3(**options: Any) -> Qwen3ForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
    }
    return perturbed(Qwen3ForCausalLM(Qwen3Config(**{**sizes, **options})))


def perturbed(model: PreTrainedModel) -> Any:
    """The model in evaluation mode, no bias zero, no gain one, attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def rope(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (gpt2, {}),
    "gpt2-untied-relu-wide": (
        gpt2,
        {
            "tie_word_embeddings": False,
            "activation_function": "relu",
            "n_inner": 24,
            "layer_norm_epsilon": 1e-2,
        },
    ),
    "gpt2-one-head": (gpt2, {"n_head": 1, "n_layer": 1, "activation_function": "gelu"}),
    "gpt_neox": (gpt_neox, {}),
    "gpt_neox-sequential": (gpt_neox, {"use_parallel_residual": False, "layer_norm_eps": 1e-2}),
    "gpt_neox-full-rotary-no-bias": (
        gpt_neox,
        {**rope("default", partial_rotary_factor=1.0), "attention_bias": False, "hidden_act": "gelu_fast"},
    ),
    "gpt_neox-tied-linear": (
        gpt_neox,
        {**rope("linear", factor=4.0, partial_rotary_factor=0.5), "tie_word_embeddings": True},
    ),
    "llama": (llama, {}),
    "llama-multi-head-tied": (llama, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-multi-query-biased": (
        llama,
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
    ),
    "llama-head-dim": (llama, {"head_dim": 12, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-llama3": (
        llama,
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-linear": (llama, rope("linear", factor=2.0)),
    "llama-yarn": (llama, rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-dynamic": (llama, {**rope("dynamic", factor=4.0), "max_position_embeddings": 8}),
    "llama-longrope": (
        llama,
        {
            **rope(
                "longrope",
                factor=4.0,
                original_max_position_embeddings=8,
                short_factor=[1.0, 1.5, 2.0, 2.5],
                long_factor=[2.0, 3.0, 4.0, 5.0],
            ),
        },
    ),
    "qwen3": (qwen3, {}),
    "qwen3-tied-biased": (qwen3, {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-2}),
    "qwen3-yarn": (qwen3, rope("yarn", factor=4.0, original_max_position_embeddings=16)),
}
EACH_ARCHITECTURE = ["gpt2", "gpt_neox", "llama", "qwen3"]


def build(name: str) -> PreTrainedModel:
    make, options = MODELS[name]
    return make(**options)


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def padding_mask(side: str) -> torch.Tensor:
    """Sequences of 12, 7 and 1 tokens, padded on one side."""
    lengths = torch.tensor([[LENGTH], [7], [1]])
    ascending = torch.arange(LENGTH).expand(3, -1)
    return ((ascending if side == "right" else ascending.flip(1)) < lengths).long()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_same_logits(name: str) -> None:
    theirs = build(name)
    ours = from_hf(theirs)
    assert isinstance(ours, NormfreeForCausalLM)
    expected = theirs(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(tokens()).logits, expected, rtol=0, atol=1e-5)
    for side in ("left", "right"):
        mask = padding_mask(side)
        kept = mask.bool()
        expected = theirs(tokens(), attention_mask=mask).logits[kept]
        actual = ours(tokens(), attention_mask=mask).logits[kept]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EACH_ARCHITECTURE)
@torch.no_grad()
def test_same_logits_for_each_attention_implementation(name: str, implementation: str) -> None:
    theirs = build(name)
    theirs.set_attn_implementation(implementation)
    ours = from_hf(theirs)
    assert ours.config._attn_implementation == implementation
    mask = padding_mask("left")
    expected = theirs(tokens(), attention_mask=mask).logits[mask.bool()]
    actual = ours(tokens(), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*EACH_ARCHITECTURE, "gpt_neox-sequential", "llama-llama3"])
@torch.no_grad()
def test_same_generation_with_and_without_cache(name: str) -> None:
    theirs = build(name)
    ours = from_hf(theirs)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for mask in (torch.ones(3, LENGTH, dtype=torch.long), padding_mask("left")):
        expected = theirs.generate(tokens(), attention_mask=mask, **options)
        for use_cache in (True, False):
            actual = ours.generate(tokens(), attention_mask=mask, use_cache=use_cache, **options)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", EACH_ARCHITECTURE)
def test_same_loss_and_gradients(name: str) -> None:
    theirs = build(name)
    ours = from_hf(theirs)
    expected = theirs(tokens(), labels=tokens())
    actual = ours(tokens(), labels=tokens())
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)
    expected.loss.backward()
    actual.loss.backward()
    torch.testing.assert_close(
        ours.get_input_embeddings().weight.grad,
        theirs.get_input_embeddings().weight.grad,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_copies_and_complete(name: str) -> None:
    theirs = build(name)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = from_hf(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    storages = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in ours.parameters()}
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(torch.nan)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_save_and_load_keep_the_logits(name: str, tmp_path: Any) -> None:
    theirs = build(name)
    from_hf(theirs).save_pretrained(tmp_path)
    loaded = NormfreeForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EACH_ARCHITECTURE)
def test_mode_dtype_and_generation_config_are_kept(name: str) -> None:
    theirs = build(name).to(torch.bfloat16).train()
    theirs.generation_config.top_k = 7
    ours = from_hf(theirs)
    assert ours.training
    assert all(module.training for module in ours.modules())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours.dtype == ours.config.dtype == torch.bfloat16
    assert ours.generation_config == theirs.generation_config
    assert ours.generation_config is not theirs.generation_config
    for option in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"):
        assert getattr(ours.config, option) == getattr(theirs.config, option)
    assert not from_hf(theirs.eval()).training


@torch.no_grad()
def test_rotary_frequencies_rounded_by_a_cast_are_kept() -> None:
    theirs = llama().to(torch.bfloat16)
    ours = from_hf(theirs)
    assert torch.equal(ours.model.rotary_embedding.inv_freq, theirs.model.rotary_emb.inv_freq)
    theirs, ours = theirs.float(), ours.float()
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (gpt2(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3), (0.1, 0.2, 0.3)),
        (gpt_neox(hidden_dropout=0.1, attention_dropout=0.2), (0.1, 0.2, 0.1)),
        (llama(attention_dropout=0.2), (0.0, 0.2, 0.0)),
        (qwen3(attention_dropout=0.2), (0.0, 0.2, 0.0)),
    ],
    ids=EACH_ARCHITECTURE,
)
def test_dropouts_act_in_the_same_places(theirs: Any, expected: tuple[float, ...]) -> None:
    """With one seed both draw the same masks in the same order, so the logits agree in training mode too."""
    ours = from_hf(theirs.train())
    config = ours.config
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == expected
    torch.manual_seed(3)
    expected_logits = theirs(tokens()).logits
    torch.manual_seed(3)
    torch.testing.assert_close(ours(tokens()).logits, expected_logits, rtol=0, atol=1e-5)
    torch.manual_seed(4)
    assert not torch.allclose(ours(tokens()).logits, expected_logits, atol=1e-2)


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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights = False"),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        (lambda: gpt2(reorder_and_upcast_attn=True), "reorder_and_upcast_attn = True"),
        (lambda: gpt2(add_cross_attention=True), "add_cross_attention = True"),
        (lambda: gpt2(activation_function="quick_gelu"), "unknown activation_function 'quick_gelu'"),
        (lambda: gpt_neox(hidden_act="mish"), "unknown hidden_act 'mish'"),
        (lambda: llama(hidden_act="hardswish"), "unknown hidden_act 'hardswish'"),
        (lambda: llama(**rope("default", partial_rotary_factor=0.5)), "partial_rotary_factor = 0.5"),
        (lambda: gpt2(resid_pdrop=1.0), "residual_dropout is 1.0"),
        (lambda: qwen3(**rope("default", partial_rotary_factor=0.5)), "which Qwen3ForCausalLM does not follow"),
        (
            lambda: qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1),
            r"layer_types = \['full_attention', 'sliding_attention', 'sliding_attention'\] has no counterpart",
        ),
    ],
)
def test_options_without_counterpart_are_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        from_hf(model())
    assert "\n" not in str(error.value)


def test_other_classes_are_refused_by_name() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    mistral = MistralForCausalLM(MistralConfig(vocab_size=8, intermediate_size=8, **sizes))
    allowed = "allowed: GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM"
    with pytest.raises(InputError, match=f"cannot convert a MistralForCausalLM; {allowed}"):
        from_hf(mistral)
    with pytest.raises(InputError, match=f"cannot convert a GPT2Model; {allowed}"):
        from_hf(gpt2().transformer)
    with pytest.raises(InputError, match="cannot convert a NormfreeForCausalLM"):
        from_hf(from_hf(gpt2()))

    class ChangedLlama(LlamaForCausalLM):
        """A subclass may compute anything."""

    with pytest.raises(InputError, match="cannot convert a ChangedLlama"):
        from_hf(ChangedLlama(llama().config))


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
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)
