"""Which operations a model has, and their shapes, against counts by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from normfree import NormfreeConfig
from normfree.errors import InputError
from normfree_private.operations import GROUPS, alternatives, block_steps, model_steps

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 50, "n_positions": 16}


def shapes(config: NormfreeConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {step.name: step.operation.shapes for step in block_steps(config, 0, 16)}


def test_a_gpt2_block() -> None:
    assert shapes(NormfreeConfig(**SIZES)) == {
        "attention norm": ((16, 32), (32,), (32,)),
        "query projection": ((16, 32), (32, 32)),
        "key projection": ((16, 32), (32, 32)),
        "value projection": ((16, 32), (32, 32)),
        "attention scores": ((4, 16, 8), (4, 16, 8)),
        "softmax": ((4, 16, 16),),
        "attention output": ((4, 16, 16), (4, 16, 8)),
        "output projection": ((16, 32), (32, 32)),
        "FFN norm": ((16, 32), (32,), (32,)),
        "up projection": ((16, 32), (32, 128)),
        "activation": ((16, 128),),
        "down projection": ((16, 128), (128, 32)),
    }


def test_a_llama_block() -> None:
    config = NormfreeConfig(
        **SIZES, norm="rmsnorm", final_norm="rmsnorm", ffn="gated", activation="silu", position="rotary", n_kv_head=2
    )
    found = shapes(config)
    assert found["key projection"] == ((16, 32), (32, 16))
    assert found["query rotation"] == ((4, 16, 8),)
    assert found["key rotation"] == ((2, 16, 8),)
    assert found["gate projection"] == found["up projection"] == ((16, 32), (32, 128))
    assert found["gating"] == ((16, 128), (16, 128))
    assert found["attention norm"] == ((16, 32), (32,))


def test_a_whole_model() -> None:
    config = NormfreeConfig(**SIZES, activation=["gelu", "relu", "relu"])
    steps = model_steps(config, 16)
    assert [step.name for step in steps[:1] + steps[-2:]] == ["embedding", "final norm", "unembedding"]
    assert steps[0].operation.shapes == ((16, 50), (50, 32))
    assert steps[-1].operation.shapes == ((16, 32), (32, 50))
    counts = Counter(step.operation.kind for step in steps)
    assert counts == {
        "linear": 3 * 6 + 2,
        "attention_scores": 3,
        "softmax": 3,
        "attention_output": 3,
        "layernorm": 3 * 2 + 1,
        "gelu": 1,
        "relu": 2,
    }
    assert {step.group for step in steps} < set(GROUPS)
    assert {step.layer for step in model_steps(config, 16, blocks_only=True)} == {0, 1, 2}


def test_norms() -> None:
    names = set(shapes(NormfreeConfig(**SIZES)))
    assert names - set(shapes(NormfreeConfig(**SIZES, norm="none"))) == {"attention norm", "FFN norm"}
    constant = NormfreeConfig(**SIZES, norm="constant_std")
    assert set(shapes(constant)) - names == {"value norm"}
    scaled, plain = (
        block_steps(NormfreeConfig(**SIZES, norm=norm), 1, 16) for norm in ("layernorm_scaling", "layernorm")
    )
    assert [step.operation for step in scaled] == [step.operation for step in plain]


def test_alternatives_are_on_the_same_arrays() -> None:
    found = alternatives(NormfreeConfig(**SIZES), 16)
    assert {operation.shapes[0] for _, group, operation in found if group == "norm"} == {(16, 32)}
    assert {operation.shapes[0] for _, group, operation in found if group == "activation"} == {(16, 128)}
    assert len({label for label, _, _ in found}) == len(found) == 13
    (spark,) = (dict(operation.options) for label, _, operation in found if label == "Spark's threshold")
    assert spark["quantile"] == pytest.approx(1.40507, abs=1e-5)  # of the normal distribution, above it 8 %


def test_shapes_as_text() -> None:
    steps = {step.name: step.operation.shape_text for step in block_steps(NormfreeConfig(**SIZES), 0, 16)}
    assert steps["up projection"] == "[16, 32] × [32, 128]"
    assert steps["FFN norm"] == "[16, 32]"


@pytest.mark.parametrize(
    "options",
    [
        {"norm_placement": "sandwich"},
        {"qk_norm": "rmsnorm"},
        {"norm_placement": "hybrid"},
        {"sliding_window": 4},
        {"embedding_multiplier": 2.0},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_what_has_no_counterpart_is_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"{name} .* has no encrypted counterpart yet; those with one: "):
        block_steps(NormfreeConfig(**SIZES, **options), 0, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "constant_std", "norm_placement": "post"},
        {"norm": "constant_std", "final_norm": "constant_std", "final_norm_is_centered": False},
    ],
)
def test_constant_stds_that_the_engine_would_misread_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"constant stds have no encrypted counterpart.*remove_norms"):
        block_steps(NormfreeConfig(**SIZES, **options), 0, 16)
