"""The stock export against the constant-std model, loaded as any GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from normfree import from_hf
from normfree.errors import InputError
from normfree.removal import remove_norms, to_gpt2

from .models import constant_std, constant_std_of, stock, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_plain_gpt2_with_the_same_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = constant_std_of("gpt2").to(dtype)
    to_gpt2(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is GPT2LMHeadModel
    assert again.lm_head.weight is again.transformer.wte.weight
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=2e-5)


def test_the_residual_stream_is_that_of_the_folded_model() -> None:
    model = constant_std_of("gpt2")
    with torch.no_grad():
        theirs = to_gpt2(model)(tokens(), output_hidden_states=True).hidden_states[-2]
        ours = remove_norms(model)(tokens(), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: remove_norms(constant_std_of("gpt2")),
            "norm = 'none' has no counterpart in GPT-2; only 'constant_std'",
        ),
        (lambda: constant_std_of("gpt_neox"), "parallel_residual = True"),
        (lambda: constant_std_of("llama"), "norm_is_centered = False"),
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
    ],
)
def test_what_gpt2_cannot_be_is_named(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_gpt2(model())
