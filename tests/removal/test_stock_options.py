"""The stock export of made-up configurations: equal logits, with padding and from a cache, or an option named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from normfree import NormfreeConfig, NormfreeForCausalLM, to_stock
from normfree.errors import InputError
from normfree.removal.stock import check_predictions

from ..nightly import NIGHTLY
from .models import FAMILIES, ROPE, VOCAB, constant_std_with, tokens

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ALL_FAMILIES = FAMILIES | {
    "Qwen3": FAMILIES["Llama"] | SLIDING,
    "Gemma 2": FAMILIES["Llama"] | SLIDING | {"attn_logit_softcapping": 20.0, "tie_word_embeddings": True},
    "Gemma 3": FAMILIES["Llama"]
    | SLIDING
    | {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {**ROPE, "rope_type": "default"},
        },
    },
}
VALUES: dict[str, tuple[Any, ...]] = {
    "n_head": (1, 2, 8),
    "n_kv_head": (1, 2, 4),
    "head_dim": (4, 8, 16),
    "n_inner": (24, 40),
    "activation": (
        *("gelu", "gelu_tanh", "relu", "leaky_relu", "learnable_leaky_relu", "silu", "relu_squared"),
        *(["relu", "relu"], ["relu", "gelu"], ["leaky_relu", "leaky_relu"]),
    ),
    "negative_slope": (0.01, 0.2),
    "ffn": ("dense", "gated", "spark", "topk"),
    "mlp_bias": (True, False),
    "attention_bias": ("none", "qk", "qkv", "all"),
    "attention_scale": (0.2, 8**-0.5),
    "attn_logit_softcapping": (20.0,),
    "final_logit_softcapping": (20.0,),
    "attention": ("spark",),
    "attention_active": (4,),
    "qk_norm": ("layernorm", "rmsnorm"),
    "norm": ("none", "rmsnorm", "layernorm", "dyt"),
    "final_norm": ("none", "rmsnorm", "layernorm", "derf"),
    "norm_is_centered": (True, False),
    "norm_placement": ("post", "sandwich", "hybrid", "mix"),
    "norm_eps": (1e-3,),
    "parallel_residual": (True, False),
    "position": ("learned", "rotary"),
    "positions_skip_padding": (True,),
    "rope_parameters": (
        {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_theta": 500.0, "rope_type": "default"},
        {**ROPE, "rope_type": "linear", "factor": 2.0},
        {**ROPE, "rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 12},
        {**ROPE, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12},
        {
            **ROPE,
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 12,
        },
        {
            **ROPE,
            **{"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 12},
            **{"short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
        },
        {"full_attention": {**ROPE, "rope_type": "default"}},
        {
            "full_attention": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5},
            "sliding_attention": {**ROPE, "rope_type": "default"},
        },
        {
            "full_attention": {"rope_theta": 100.0, "rope_type": "default"},
            "sliding_attention": {
                **ROPE,
                **{"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 12},
                **{"short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
            },
        },
    ),
    "sliding_window": (4,),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"]),
    "scale_embeddings": (True,),
    "embedding_multiplier": (3.0,),
    "tie_word_embeddings": (True, False),
    "lm_head_bias": (True,),
    "embedding_dropout": (0.1,),
    "residual_dropout": (0.1,),
    "attention_dropout": (0.1,),
    "eos_token_id": (2, [2, 3]),
    "pad_token_id": (0,),
    "bos_token_id": (1,),
    "use_cache": (False,),
    "initializer_range": (0.03,),
    "scale_residual_init": (True,),
}
FOLLOWS: dict[str, tuple[str, ...]] = {
    # Another family, which has not all the others.
    "ffn": ("parallel_residual", "norm_is_centered", "final_norm_is_centered", "sliding_window"),
    "position": ("ffn", "parallel_residual"),
    "norm_is_centered": ("final_norm_is_centered",),
    "attn_logit_softcapping": ("rope_parameters",),
    "residual_dropout": ("embedding_dropout",),
}
"""Options that another one changes, and that a message names in its place."""
EXAMPLES = 2000 if NIGHTLY else 60


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """The options of a family, up to three of them changed."""
    changed = draw(st.lists(st.sampled_from([*VALUES]), max_size=3, unique=True))
    family = draw(st.sampled_from([*ALL_FAMILIES]))
    return {**ALL_FAMILIES[family], **{name: draw(st.sampled_from(VALUES[name])) for name in changed}}


def cached_logits(model: Any, input_ids: torch.Tensor, n_first: int) -> torch.Tensor:
    """The logits of all positions, the first ``n_first`` in one step and the others one by one."""
    first = model(input_ids[:, :n_first], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for i in range(n_first, input_ids.shape[1]):
        step = model(input_ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        parts, cache = [*parts, step.logits], step.past_key_values
    return torch.cat(parts, dim=1)


@torch.no_grad()
def refused(model: NormfreeForCausalLM) -> str | None:
    """Why the model has no stock export; None for one that was found equal."""
    try:
        stock = to_stock(model)
    except InputError as error:
        return str(error)
    assert type(stock).__module__.startswith("transformers.")
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}  # Llama's norms compute in float32
    padding = torch.ones(3, 17, dtype=torch.long)
    padding[1, 15:] = 0  # within the window: transformers' Gemma 2 is NaN in float64 where a query sees no key
    torch.testing.assert_close(stock(tokens()).logits, model(tokens()).logits, **close)
    padded, expected = (each(tokens(), attention_mask=padding).logits[padding.bool()] for each in (stock, model))
    torch.testing.assert_close(padded, expected, **close)
    torch.testing.assert_close(cached_logits(stock, tokens(), 10), cached_logits(model, tokens(), 10), **close)
    assert stock.config.eos_token_id == model.config.eos_token_id
    rates = [getattr(model.config, f"{part}_dropout") for part in ("embedding", "residual", "attention")]
    assert {*rates} <= {*(value for value in vars(stock.config).values() if isinstance(value, float)), 0.0}
    return None


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(options=option_sets())
def test_equal_logits_or_an_option_named(options: dict[str, Any]) -> None:
    try:
        model = constant_std_with(options)
    except InputError:
        assume(False)  # no such model
    reason = refused(model)
    assert reason is None or reason.split()[0] in NormfreeConfig.option_names(), reason


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("name", VALUES)
def test_one_option_changed(family: str, name: str) -> None:
    """Every value of every option alone: what is refused is named, or what follows from it."""
    for value in VALUES[name]:
        try:
            model = constant_std_with({**ALL_FAMILIES[family], name: value})
        except InputError:
            continue
        reason = refused(model)
        assert reason is None or reason.split()[0] in (name, *FOLLOWS.get(name, ())), reason


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"activation": "leaky_relu"}, True),
        ({"activation": ["leaky_relu", "leaky_relu"]}, True),
        ({"activation": "leaky_relu", "negative_slope": 0.2}, False),
        ({"activation": ["relu", "gelu"]}, False),
        ({**FAMILIES["Llama"], "rope_parameters": VALUES["rope_parameters"][6]}, False),
        ({**FAMILIES["Llama"], "rope_parameters": VALUES["rope_parameters"][7]}, True),
    ],
)
def test_what_is_taken_and_what_is_refused(options: dict[str, Any], taken: bool) -> None:
    assert (refused(constant_std_with(options)) is None) == taken


@pytest.mark.parametrize("family", FAMILIES)
def test_stds_that_are_too_large_for_epsilon_are_noticed(family: str) -> None:
    """Residual streams of a std of 10³ export; those of 10⁷, more than √ε, do not."""
    model = constant_std_with({**FAMILIES[family], "tie_word_embeddings": False}).float()
    check_predictions(to_stock(model), model, tokens())
    embeddings = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(4))

    def scale_to(std: float) -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(std * embeddings)
            for name, buffer in model.named_buffers():
                if name.endswith("_norm.std"):
                    buffer.fill_(std)

    scale_to(1e3)
    check_predictions(to_stock(model), model, tokens())
    scale_to(1e7)
    with pytest.raises(InputError, match=r"log-probabilities of a stock export differ by .* nats"):
        check_predictions(to_stock(model), model, tokens())
