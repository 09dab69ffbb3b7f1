"""With ``norm`` and ``final_norm`` "none" the traced computation holds no normalization op.

The proof reads the graph of core ATen ops from tokens to logits, not the modules. A norm divides by a statistic of
the features, so it takes a mean or a sum, a root or a division; norm-free graphs hold none outside the softmax.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM

NAMED_NORMS = {
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "native_batch_norm",
    "native_group_norm",
    "native_layer_norm",
    "_fused_rms_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "linalg_vector_norm",
    "norm",
    "renorm",
}
STATISTICS = {"mean", "sum", "std", "std_mean", "var", "var_mean", "amax", "amin", "prod"}
DIVISIONS = {"div", "reciprocal", "rsqrt", "sqrt"}
NORMALIZING = NAMED_NORMS | STATISTICS | DIVISIONS | {"pow of a fraction"}
ALL_ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "leaky_relu", "learnable_leaky_relu", "silu", "relu_squared"]


def ops(implementation: str = "sdpa", **options: Any) -> set[str]:
    """The names of the ops in the core ATen graph of a float32 model's forward pass."""
    sizes: dict[str, Any] = {"vocab_size": 19, "n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = NormfreeForCausalLM(NormfreeConfig(**{**sizes, **options})).eval()
    model.set_attn_implementation(implementation)
    return ops_of(model)


def ops_of(model: NormfreeForCausalLM) -> set[str]:
    inputs = {"input_ids": torch.randint(19, (2, 9)), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs).run_decompositions()
    names = set()
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        # a power counts when it can be a root: x² alone is an activation
        if name == "pow":
            name = "pow of an integer" if node.args[1] in (2, 3) else "pow of a fraction"
        names.add(name)
    assert {"embedding", "bmm", "_softmax"} <= names, "the graph is not one of core ATen ops"
    return names


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_layer": 7, "activation": ALL_ACTIVATIONS},
        {"parallel_residual": True, "tie_word_embeddings": False, "ffn": "gated", "n_kv_head": 1},
    ],
    ids=["all-activations", "parallel-gated"],
)
def test_no_normalization_op(options: dict[str, Any], implementation: str, position: str) -> None:
    found = ops(implementation, norm="none", final_norm="none", position=position, **options)
    assert found & NORMALIZING == set()


@pytest.mark.parametrize(
    "options",
    [{"activation": "learnable_leaky_relu", "slope_sharing": "global"}, {"scale_embeddings": True}],
    ids=["global-slope", "scaled-embeddings"],
)
def test_no_normalization_op_with_learned_numbers(options: dict[str, Any]) -> None:
    assert ops(norm="none", final_norm="none", **options) & NORMALIZING == set()


def test_dynamic_tanh_is_no_normalization() -> None:
    """It takes no statistic and divides by nothing: it bounds."""
    assert ops(norm="dyt", final_norm="dyt") & NORMALIZING == set()
    assert ops(norm="derf", final_norm="derf") & NORMALIZING == set()


@pytest.mark.parametrize(
    ("norm", "final_norm", "expected"),
    [
        ("layernorm", "layernorm", {"native_layer_norm"}),
        ("rmsnorm", "rmsnorm", {"mean", "rsqrt"}),
        ("layernorm", "none", {"native_layer_norm"}),
        ("rmsnorm", "none", {"mean", "rsqrt"}),
        ("none", "layernorm", {"native_layer_norm"}),
        ("none", "rmsnorm", {"mean", "rsqrt"}),
    ],
)
def test_the_same_check_finds_every_norm(norm: str, final_norm: str, expected: set[str]) -> None:
    assert ops(norm=norm, final_norm=final_norm) & NORMALIZING == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"norm": "layernorm_scaling"}, {"native_layer_norm"}),
        ({"norm": "rmsnorm_scaling"}, {"mean", "rsqrt"}),
        ({"norm": "none", "qk_norm": "rmsnorm"}, {"mean", "rsqrt"}),
        ({"norm": "none", "qk_norm": "layernorm"}, {"native_layer_norm"}),
        ({"norm": "rmsnorm", "norm_placement": "hybrid"}, {"mean", "rsqrt"}),
        ({"norm": "layernorm", "norm_placement": "sandwich"}, {"native_layer_norm"}),
    ],
)
def test_the_same_check_finds_norms_in_every_place(options: dict[str, Any], expected: set[str]) -> None:
    assert ops(final_norm="none", **options) & NORMALIZING == expected


@pytest.mark.parametrize(
    "disguised",
    [
        lambda x: x / x.std(-1, keepdim=True),
        lambda x: x / (x @ x.mT).diagonal(dim1=-2, dim2=-1).unsqueeze(-1) ** 0.5,
        lambda x: x / x.abs().amax(-1, keepdim=True),
        lambda x: torch.nn.functional.normalize(x, dim=-1),
        lambda x: torch.nn.functional.group_norm(x, 1),
    ],
    ids=["std", "diagonal", "maximum", "normalize", "group_norm"],
)
def test_the_same_check_finds_norms_without_a_name(disguised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms written by hand inside an activation, where no module tells of them."""

    class Innocent(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return disguised(x)

    monkeypatch.setattr("normfree.modeling.activations.ACTIVATIONS", {"gelu": lambda _: Innocent()})
    assert ops(norm="none", final_norm="none") & NORMALIZING
