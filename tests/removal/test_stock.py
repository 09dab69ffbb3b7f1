"""The stock export against the constant-std model, loaded as any model of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf, to_stock
from normfree.errors import InputError
from normfree.removal import remove_norms

from .models import VOCAB, constant_std, constant_std_of, perturbed, stock, tokens

CLASSES = {"gpt2": GPT2LMHeadModel, "gpt_neox": GPTNeoXForCausalLM, "llama": LlamaForCausalLM}
OTHERS = {"qwen3": Qwen3ForCausalLM, "gemma3": Gemma3ForCausalLM}
UNTIED = ("llama, post", "llama, hybrid", "llama, scaled", "gemma3, soft-capped logits")
"""Their unembedding takes in what the stock model has no place for."""


def llama_with(**options: Any) -> NormfreeForCausalLM:
    """A constant-std Llama with other options, its new weights random."""
    model = constant_std(from_hf(stock("llama")), **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def grouped_gpt2() -> NormfreeForCausalLM:
    norms: dict[str, Any] = {"norm": "constant_std", "final_norm": "constant_std"}
    return NormfreeForCausalLM(NormfreeConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, vocab_size=43, **norms))


def rotary(**options: Any) -> NormfreeForCausalLM:
    """Normfree's own model with RMSNorms, or other options, after their removal."""
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "vocab_size": VOCAB}
    llama: dict[str, Any] = {"norm": "rmsnorm", "final_norm": "rmsnorm", "position": "rotary", "ffn": "gated"}
    biases = {"attention_bias": "none", "mlp_bias": False}
    torch.manual_seed(0)
    source = perturbed(NormfreeForCausalLM(NormfreeConfig(**sizes, **llama | biases | options)), 0.1)
    return constant_std(source, qk_norm_is_constant=source.config.qk_norm != "none")


VARIANTS = {
    "gpt2": lambda: constant_std_of("gpt2"),
    "gpt2 without biases": lambda: constant_std(from_hf(stock("gpt2")), attention_bias="none", mlp_bias=False),
    "gpt_neox": lambda: constant_std_of("gpt_neox"),
    "gpt_neox, one sublayer after the other": lambda: constant_std(from_hf(stock("gpt_neox")), parallel_residual=False),
    "gpt_neox without biases": lambda: constant_std(from_hf(stock("gpt_neox")), attention_bias="none"),
    "llama": lambda: constant_std_of("llama"),
    "llama, tied": lambda: constant_std(from_hf(stock("llama")), tie_word_embeddings=True),
    "llama with biases on q and k": lambda: llama_with(attention_bias="qk", mlp_bias=True),
    "gpt2 with QK-norm": lambda: constant_std(
        from_hf(stock("gpt2")), qk_norm="layernorm_per_head", qk_norm_is_constant=True
    ),
    "gpt2, sandwich": lambda: constant_std(from_hf(stock("gpt2")), norm_placement="sandwich"),
    "llama, sandwich": lambda: rotary(norm_placement="sandwich", qk_norm="rmsnorm"),
    "llama, reordered": lambda: rotary(norm_placement="reordered", qk_norm="rmsnorm_full_width"),
    "llama, post": lambda: rotary(norm_placement="post"),
    "llama, hybrid": lambda: rotary(norm_placement="hybrid"),
    "llama, LayerNorm in its blocks": lambda: rotary(norm="layernorm", qk_norm="layernorm"),
    "llama, scaled": lambda: rotary(attention_scale=0.7, embedding_multiplier=3.0),
    "llama, no final norm": lambda: rotary(final_norm="none"),
    "llama, norm-free": lambda: remove_norms(rotary(tie_word_embeddings=False)),
    "qwen3": lambda: rotary(qk_norm="rmsnorm", sliding_window=5, attention_bias="qkv"),
    "gemma3": lambda: rotary(
        norm_placement="sandwich",
        qk_norm="rmsnorm",
        embedding_multiplier=32**0.5,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))
        },
    ),
    "gemma3, soft-capped logits": lambda: rotary(final_logit_softcapping=3.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_plain_model_with_the_same_logits(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = VARIANTS[variant]()
    model.to(dtype)
    to_stock(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is (CLASSES | OTHERS)[variant.split()[0].strip(",")]
    is_tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert is_tied == (model.config.tie_word_embeddings and variant not in UNTIED)
    padding = torch.ones(3, 17, dtype=torch.long)
    padding[1, 12:] = 0
    with torch.no_grad():
        for mask in (None, padding):
            seen = slice(None) if mask is None else mask.bool()
            logits = again(tokens(), attention_mask=mask).logits[seen]
            expected = model(tokens(), attention_mask=mask).logits[seen]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", CLASSES)
def test_the_residual_stream_is_that_of_the_folded_model(family: str) -> None:
    model = constant_std_of(family)
    with torch.no_grad():
        theirs = to_stock(model)(tokens(), output_hidden_states=True).hidden_states[-2]
        folded = remove_norms(model)(tokens(), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(theirs, folded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CLASSES)
def test_it_survives_bfloat16(family: str, tmp_path: Path) -> None:
    """Rounded to bfloat16, it is about as close to float32 as the model without norms and that with constant stds."""
    model = constant_std_of(family)
    to_stock(model).save_pretrained(tmp_path)
    in_bfloat16 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model(tokens()).logits
        rounded, norm_free, constant = (
            (each(tokens()).logits - exact).abs().mean()
            for each in (in_bfloat16, remove_norms(model).bfloat16(), model.bfloat16())
        )
    assert rounded < 1.5 * min(norm_free, constant)
    assert max(rounded, norm_free) < 0.1 * exact.std()
    in_float16 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert not in_float16(tokens()).logits.isfinite().any(), "as the model card says"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: remove_norms(constant_std_of("gpt2")), "norm = 'none' has no counterpart in GPT-2"),
        (lambda: from_hf(stock("llama")), "norm = 'rmsnorm' has no counterpart in Llama; only 'constant_std'"),
        (lambda: constant_std(from_hf(stock("gpt2")), parallel_residual=True), "parallel_residual = True"),
        (lambda: constant_std_of("gpt2").half(), "float16 cannot hold"),
        (lambda: constant_std(from_hf(stock("gpt2")), qk_norm="layernorm"), "qk_norm = 'layernorm' has no counterpart"),
        (lambda: constant_std(from_hf(stock("gpt2")), scale_embeddings=True), "scale_embeddings = True has no"),
        *(
            (
                lambda option=option, value=value: constant_std(from_hf(stock("gpt2")), **{option: value}),
                f"{option} = {value} has no counterpart in GPT-2",
            )
            for option, value in (
                ("embedding_multiplier", 2.0),
                ("attention_scale", 1.0),
                ("attn_logit_softcapping", 30.0),
                ("final_logit_softcapping", 30.0),
                ("positions_skip_padding", True),
            )
        ),
        (
            lambda: constant_std(from_hf(stock("gpt2")), norm_placement="post"),
            "norm_placement = 'post' has no counterpart in GPT-2",
        ),
        (lambda: rotary(norm="layernorm", final_norm="layernorm"), "final_norm_is_centered = True has no counterpart"),
        (lambda: rotary(norm="layernorm", norm_placement="post"), "lm_head_bias, which takes in the shift of norms"),
        (lambda: rotary(norm="layernorm", sliding_window=4), "mlp_bias = True has no counterpart in Qwen3"),
        (grouped_gpt2, "n_kv_head = 2 has no counterpart in GPT-2"),
        (lambda: constant_std(from_hf(stock("gpt_neox")), residual_dropout=0.1), "embedding_dropout = 0.0"),
        (lambda: constant_std(from_hf(stock("llama")), residual_dropout=0.1), "residual_dropout = 0.1"),
        (lambda: constant_std(from_hf(stock("llama")), parallel_residual=True), "parallel_residual = True"),
        (
            lambda: constant_std(from_hf(stock("llama")), activation=["silu", "relu", "silu"]),
            "activation .* has no counterpart in Llama; allowed, for all layers",
        ),
        (
            lambda: constant_std(
                from_hf(stock("llama")),
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            ),
            "partial_rotary_factor.* has no counterpart in Llama",
        ),
    ],
)
def test_what_the_architecture_cannot_hold_is_named(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_stock(model())
