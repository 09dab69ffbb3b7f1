"""Costs on paper against sums made by hand, and the published reduction for Gemma-2 2B's shapes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.spark.accounting import PARTS, PartCost, decode_cost, total_bytes, total_flops

# Gemma 2 2B: "Gemma 2: Improving Open Language Models at a Practical Size" (2024), Table 1.
GEMMA: dict[str, Any] = {
    "vocab_size": 256128,
    "n_layer": 26,
    "n_head": 8,
    "n_kv_head": 4,
    "head_dim": 256,
    "n_embd": 2304,
    "n_positions": 8192,
    "attention_bias": "none",
    "mlp_bias": False,
}
DENSE: dict[str, Any] = {**GEMMA, "ffn": "gated", "n_inner": 9216}
# As many parameters: three matrices of 9,216 neurons are two of 13,824.
SPARK: dict[str, Any] = {
    **GEMMA,
    "ffn": "spark",
    "n_inner": 13824,
    "ffn_active": 0.08,
    "attention": "spark",
    "attention_active": 256,
}
WINDOWS = [4096, 8192] * 13


def by_part(costs: tuple[PartCost, ...]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for each in costs:
        sums[each.part] += each.flops
    return dict(sums)


def test_a_dense_layer_by_hand() -> None:
    config = NormfreeConfig(vocab_size=11, n_layer=1, n_head=4, n_kv_head=2, n_embd=8, head_dim=3, n_inner=20)
    costs = {each.part: each for each in decode_cost(config, context_length=5, bytes_per_weight=4, bytes_per_cached=1)}
    # q and o: 8 x 12; k and v: 8 x 6
    assert costs["attention projections"].flops == 2 * (2 * 96 + 2 * 48)
    assert costs["attention projections"].weight_bytes == 4 * (2 * 96 + 2 * 48)
    assert costs["attention scores"].flops == costs["attention values"].flops == 2 * 4 * 3 * 5
    assert costs["attention scores"].cache_bytes == 2 * 3 * 5
    assert costs["ffn in"].flops == costs["ffn out"].flops == 2 * 8 * 20
    assert costs["unembedding"].flops == 2 * 8 * 11
    assert costs["unembedding"].layer is None
    assert set(costs) == set(PARTS) - {"attention predictor", "ffn predictor"}


def test_a_sparse_layer_by_hand() -> None:
    config = NormfreeConfig(
        vocab_size=11,
        n_layer=1,
        n_head=4,
        n_kv_head=2,
        n_embd=8,
        head_dim=6,
        n_inner=20,
        ffn="spark",
        ffn_active=5,
        ffn_predictor_dim=3,
        attention="spark",
        attention_active=7,
        attention_predictor_dim=2,
    )
    costs = {each.part: each for each in decode_cost(config, context_length=50)}
    assert tuple(costs) == PARTS
    assert costs["ffn predictor"].flops == 2 * 3 * 20
    assert costs["ffn in"].flops == 2 * 5 * (8 - 3)
    assert costs["ffn out"].flops == 2 * 5 * 8
    assert costs["ffn out"].bytes_read == 2 * 5 * 8
    assert costs["attention predictor"].flops == 2 * 4 * 2 * 50
    assert costs["attention predictor"].cache_bytes == 2 * 2 * 2 * 50
    assert costs["attention scores"].flops == 2 * 4 * (6 - 2) * 7
    assert costs["attention values"].flops == 2 * 4 * 6 * 7
    assert costs["attention values"].cache_bytes == 2 * 6 * 4 * 7  # four heads with seven keys of their own
    # a context of fewer keys than k: all of them, and each key once
    short = {each.part: each for each in decode_cost(config, context_length=4)}
    assert short["attention values"].flops == 2 * 4 * 6 * 4
    assert short["attention values"].cache_bytes == 2 * 6 * 2 * 4
    # as measured
    measured = {each.part: each for each in decode_cost(config, context_length=50, active_share=0.5, attended_keys=3)}
    assert measured["ffn out"].flops == 2 * 10 * 8
    assert measured["attention values"].flops == 2 * 4 * 6 * 3


@pytest.mark.parametrize("ffn", ["dense", "gated", "spark", "topk"])
def test_weights_read_are_the_model_s_own(ffn: str) -> None:
    """With every neuron active, a step reads every weight matrix once."""
    active: dict[str, Any] = {"ffn_active": 1.0} if ffn in ("spark", "topk") else {}
    config = NormfreeConfig(vocab_size=13, n_layer=2, n_head=2, n_embd=16, n_inner=24, ffn=ffn, **active)
    model = NormfreeForCausalLM(config)
    matrices = sum(
        each.numel() for name, each in model.named_parameters() if each.dim() == 2 and "positions" not in name
    )
    costs = decode_cost(config, context_length=3, bytes_per_weight=1, bytes_per_cached=0)
    assert total_bytes(costs) == matrices
    assert total_flops(costs) - total_flops(costs, unembedding=False) == 2 * 13 * 16


def test_natural_sparsity_saves_the_last_weight_only() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 13,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_inner": 24,
        "activation": "relu",
    }
    dense = by_part(decode_cost(NormfreeConfig(**sizes), context_length=3, active_share=[0.25, 0.5]))
    assert dense["ffn in"] == 2 * 2 * 16 * 24
    assert dense["ffn out"] == 2 * 0.75 * 16 * 24
    gated = by_part(decode_cost(NormfreeConfig(**sizes, ffn="gated"), context_length=3, active_share=0.25))
    assert gated["ffn in"] == 2 * 2 * 1.25 * 16 * 24
    topk = by_part(decode_cost(NormfreeConfig(**{**sizes, "ffn": "topk", "ffn_active": 0.25}), context_length=3))
    assert (topk["ffn in"], topk["ffn out"]) == (2 * 2 * 16 * 24, 2 * 2 * 0.25 * 16 * 24)


def test_the_published_reduction_for_gemma_2_2b() -> None:
    """2.5 times fewer FLOPs (abstract): Gemma 2's local layers see 4,096 tokens of 8,192; no unembedding."""
    dense, spark = NormfreeConfig(**DENSE), NormfreeConfig(**SPARK)
    # the same number of weights, by hand: three matrices of 9,216 neurons, and two of 13,824
    assert 3 * 2304 * 9216 == 1152 * 13824 + 1152 * 13824 + 2304 * 13824
    ratio = total_flops(decode_cost(dense, context_length=WINDOWS), unembedding=False) / total_flops(
        decode_cost(spark, context_length=WINDOWS), unembedding=False
    )
    projections = 2304 * (2 * 2048 + 2 * 1024)
    k = 1106  # 8 % of 13,824
    by_hand = (2 * projections + 2 * 3 * 2304 * 9216 + 2 * 2 * 2048 * 6144) / (
        2 * projections + 2 * (1152 * 13824 + k * (1152 + 2304)) + 2 * (8 * 128 * 6144 + 256 * 8 * (128 + 256))
    )
    assert ratio == pytest.approx(by_hand, rel=1e-12)
    assert ratio == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize(("context", "unembedding", "expected"), [(8192, False, 2.59), (WINDOWS, True, 1.97)])
def test_the_reduction_depends_on_what_is_counted(context: Any, unembedding: bool, expected: float) -> None:
    ratio = total_flops(decode_cost(NormfreeConfig(**DENSE), context_length=context), unembedding=unembedding)
    ratio /= total_flops(decode_cost(NormfreeConfig(**SPARK), context_length=context), unembedding=unembedding)
    assert ratio == pytest.approx(expected, abs=0.01)


def test_the_feed_forward_network_alone() -> None:
    """By the paper's own approximation, d·d_ff + 3 d·k against 4 d·d_ff for two dense matrices (Section 2)."""
    config = NormfreeConfig(n_embd=2304, n_head=8, n_inner=9216, ffn="spark", ffn_active=737)
    spark = sum(cost for part, cost in by_part(decode_cost(config, context_length=1)).items() if part[:3] == "ffn")
    assert spark / config.n_layer == 2304 * 9216 + 3 * 2304 * 737


def test_bad_input_is_one_line() -> None:
    config = NormfreeConfig(n_layer=2, n_head=2, n_embd=16)
    for options, message in (
        ({"context_length": [1, 2, 3]}, "context_length lists 3 numbers for n_layer = 2"),
        ({"context_length": 0}, "context_length is 0; it must be from 1"),
        ({"context_length": 4, "active_share": 1.5}, "active_share is 1.5; it must be from 0 to 1"),
        ({"context_length": 4, "active_share": float("nan")}, "active_share is nan; it must be from 0 to 1"),
        ({"context_length": 4, "attended_keys": 3}, "attended_keys means nothing for attention 'softmax'"),
    ):
        with pytest.raises(InputError) as raised:
            decode_cost(config, **options)
        assert str(raised.value).startswith(message)
