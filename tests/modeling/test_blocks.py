"""Each placement's block equation, and the decoder they make, against float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.blocks import PLACEMENTS

from . import reference

SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_inner": 20}
PYTHIA = {"position": "rotary", "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "pre": {"norm_placement": "pre"},
    "post": {"norm_placement": "post"},
    "parallel": {"norm_placement": "pre", "parallel_residual": True},
    "mix": {"norm_placement": "mix"},
    "sandwich": {"norm_placement": "sandwich"},
    "reordered": {"norm_placement": "reordered"},
    "deepnorm": {"norm_placement": "deepnorm"},
    "hybrid": {"norm_placement": "hybrid"},
    "hybrid_star": {"norm_placement": "hybrid_star"},
}
NORMED = ("layernorm", "rmsnorm", "dyt")
PRE_ONLY = ("none", "layernorm_scaling", "rmsnorm_scaling")
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation": "gelu_tanh"},
    "untied": {"tie_word_embeddings": False},
    "qk-bias-relu": {"attention_bias": "qk", "activation": "relu", "norm": "none", "mlp_bias": False},
    "nothing-normalized": {"norm": "none", "final_norm": "none"},
    "post-without-final-norm": {"norm_placement": "post", "final_norm": "none"},
    "layernorm-scaling": {"norm": "layernorm_scaling"},
    "dyt-with-two-alphas": {
        "norm": "dyt",
        "final_norm": "dyt",
        "dyt_alpha": 0.2,
        "dyt_attention_alpha": 0.8,
        "scale_embeddings": True,
    },
    "mix-of-three": {"norm_placement": "mix", "n_layer": 3, "n_post_layer": 2},
    "deepnorm": {"norm_placement": "deepnorm", "n_layer": 3, "final_norm": "none"},
    "sandwich": {"norm_placement": "sandwich", "norm": "rmsnorm", "final_norm": "rmsnorm"},
    "hybrid-star-grouped": {**PYTHIA, "norm_placement": "hybrid_star", "n_kv_head": 2, "norm": "rmsnorm"},
    "qk-norm-without-other-norms": {**PYTHIA, "qk_norm": "rmsnorm", "norm": "none", "final_norm": "none"},
    "olmo2": {
        **PYTHIA,
        "norm_placement": "reordered",
        "qk_norm": "rmsnorm_full_width",
        "n_kv_head": 2,
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "ffn": "gated",
    },
    "stablelm2": {**PYTHIA, "parallel_residual": True, "qk_norm": "layernorm_per_head", "n_kv_head": 2},
    "scaled-embeddings": {"scale_embeddings": True},
    "multiplied-embeddings": {"embedding_multiplier": 3.7, "attention_scale": 0.9},
    "soft-capped": {"attn_logit_softcapping": 0.4, "final_logit_softcapping": 1.5, "attention_scale": 2},
    "soft-capped-grouped": {**PYTHIA, "n_kv_head": 2, "attn_logit_softcapping": 1, "final_logit_softcapping": 0.5},
    "pythia": {**PYTHIA, "parallel_residual": True, "tie_word_embeddings": False},
    "grouped-gated": {
        **PYTHIA,
        "n_kv_head": 2,
        "head_dim": 8,
        "ffn": "gated",
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "norm_eps": 1e-2,
        "activation": "silu",
        "attention_bias": "none",
    },
    "gated-multi-query": {
        "n_kv_head": 1,
        "ffn": "gated",
        "activation": "relu_squared",
        "attention_bias": "qkv",
    },
    "mixed-activations": {"activation": ["learnable_leaky_relu", "gelu"], "negative_slope": -0.2},
    "global-slope": {"activation": "learnable_leaky_relu", "slope_sharing": "global", "norm": "none"},
}


def build(options: dict[str, Any]) -> NormfreeForCausalLM:
    config = NormfreeConfig(**{**SIZES, **options})
    return reference.perturb(NormfreeForCausalLM(config)).double().eval()


def test_every_placement_is_tested() -> None:
    assert {options["norm_placement"] for options in ARRANGEMENTS.values()} == set(PLACEMENTS)


@pytest.mark.parametrize(
    ("arrangement", "norm", "qk_norm"),
    [
        *((arrangement, norm, "none") for arrangement in ARRANGEMENTS for norm in NORMED),
        *((arrangement, norm, "none") for arrangement in ("pre", "parallel") for norm in PRE_ONLY),
        *((arrangement, "layernorm", "rmsnorm") for arrangement in ARRANGEMENTS if "hybrid" not in arrangement),
        ("pre", "none", "layernorm"),
        *(
            (arrangement, "rmsnorm", qk_norm)
            for arrangement in ("pre", "parallel", "reordered")
            for qk_norm in ("rmsnorm_full_width", "layernorm_per_head")
        ),
    ],
)
@torch.no_grad()
def test_block_equation(arrangement: str, norm: str, qk_norm: str) -> None:
    model = build({**ARRANGEMENTS[arrangement], "norm": norm, "qk_norm": qk_norm})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for layer, block in enumerate(model.model.blocks):
        actual = block(x).numpy()
        weights = reference.weights_of(block)
        for sequence in range(2):
            expected = reference.block(model.config, weights, "", layer, x[sequence].numpy())
            np.testing.assert_allclose(actual[sequence], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoder_logits_and_loss(name: str) -> None:
    model = build(DECODERS[name])
    ids = torch.randint(19, (3, 11))
    weights = reference.weights_of(model)
    expected = np.stack([reference.logits(model.config, weights, row) for row in ids.numpy()])
    output = model(ids, labels=ids)
    # transformers computes rotary angles in float32
    tolerance = 1e-5 if model.config.position == "rotary" else 1e-9
    np.testing.assert_allclose(output.logits.numpy(), expected, rtol=tolerance, atol=tolerance)
    expected_loss = np.mean([reference.loss(model.config, weights, row) for row in ids.numpy()])
    np.testing.assert_allclose(output.loss.item(), expected_loss, rtol=1e-5)


@torch.no_grad()
def test_labels_of_minus_100_do_not_count() -> None:
    model = build({})
    ids = torch.randint(19, (1, 11))
    labels = ids.clone()
    labels[:, 7:] = -100
    expected = reference.loss(model.config, reference.weights_of(model), ids[0, :7].numpy())
    np.testing.assert_allclose(model(ids, labels=labels).loss.item(), expected, rtol=1e-6)


@torch.no_grad()
def test_hidden_states_are_the_residual_stream() -> None:
    """The embedding, the stream after each block but the last, and the final norm's output."""
    model = build({})
    ids = torch.randint(19, (1, 11))
    weights = reference.weights_of(model)
    x = weights["model.embed_tokens.weight"][ids[0].numpy()] + weights["model.embed_positions.weight"][:11]
    expected = [x, reference.block(model.config, weights, "model.blocks.0.", 0, x)]
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 3
    for actual, each in zip(hidden_states[:2], expected, strict=True):
        np.testing.assert_allclose(actual[0].numpy(), each, rtol=1e-9, atol=1e-9)
    assert torch.equal(hidden_states[-1], model.model(ids).last_hidden_state)
