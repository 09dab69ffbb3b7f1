"""The operations of a decoder that a secure computation pays for, and their shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig

GROUPS = ("linear", "attention products", "softmax", "norm", "activation", "other")
"""Groups that operations are summed by."""

NORM_KINDS = {
    "none": "none",
    "layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    # The factor of the layer is in the gain and the bias.
    "layernorm_scaling": "layernorm",
    "rmsnorm_scaling": "rmsnorm",
    "dyt": "dyt",
    "constant_std": "constant_scaling",
}
"""Norms of the configuration, and their operations under encryption."""
_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "leaky_relu", "learnable_leaky_relu", "silu", "relu_squared")
_PLACEMENTS = ("pre", "post")
_FEED_FORWARDS = ("dense", "gated")
SPARK_SHARE = 0.08
"""Share of neurons that Spark's threshold leaves active ("Spark Transformer", 2025)."""


@dataclass(frozen=True)
class Operation:
    """A function of ``engine/operations.py`` with the shapes of its secret arrays.

    ``options`` are public numbers; ``public`` are the shapes of public arrays, by name.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, float | bool], ...] = ()
    public: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def shape_text(self) -> str:
        """The shapes for a table: ``[128, 768] × [768, 3072]``; gains, biases and slopes are left out."""
        shown = [shape for shape in self.shapes if len(shape) > 1]
        return " × ".join("[" + ", ".join(str(size) for size in shape) + "]" for shape in shown)


@dataclass(frozen=True)
class Step:
    """One operation of a model: its name there, its group, and its layer (from 0; None outside the blocks)."""

    name: str
    group: str
    layer: int | None
    operation: Operation


def check_supported(config: NormfreeConfig) -> None:
    """Checks that the model has an encrypted counterpart.

    Raises:
        InputError: an option has none.
    """
    for option, allowed in (
        ("norm", NORM_KINDS),
        ("final_norm", NORM_KINDS),
        ("norm_placement", _PLACEMENTS),
        ("ffn", _FEED_FORWARDS),
        ("attention", ("softmax",)),
        ("qk_norm", ("none",)),
        ("sliding_window", (None,)),
        ("scale_embeddings", (False,)),
        ("embedding_multiplier", (None,)),
        ("attn_logit_softcapping", (None,)),
        ("final_logit_softcapping", (None,)),
    ):
        _check_option(option, getattr(config, option), allowed)
    for name in config.activations:
        _check_option("activation", name, _ACTIVATIONS)
    is_mixed = config.final_norm == "constant_std" and config.final_norm_is_centered != config.norm_is_centered
    if is_mixed or (config.norm == "constant_std" and config.norm_placement != "pre"):
        raise InputError(
            "constant stds have no encrypted counterpart in norm_placement post, or where one of norm and final_norm "
            "subtracts the mean; fold them first with normfree.remove_norms"
        )


def _check_option(option: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        names = ", ".join(str(each) for each in allowed)
        raise InputError(f"{option} {value!r} has no encrypted counterpart yet; those with one: {names}")


def block_steps(config: NormfreeConfig, layer: int, sequence_length: int) -> list[Step]:
    """The operations of block ``layer`` on a sequence of ``sequence_length`` tokens, in order.

    Additions, biases, transposition and the causal mask cost nothing in additive secret sharing and are left out.

    Raises:
        InputError: the model has no encrypted counterpart.
    """
    check_supported(config)
    return list(_block_steps(config, layer, sequence_length))


def _block_steps(config: NormfreeConfig, layer: int, sequence_length: int) -> Iterator[Step]:
    heads, key_width = config.n_head, config.n_kv_head * config.head_dim
    query_width = heads * config.head_dim

    def step(name: str, group: str, operation: Operation) -> Step:
        return Step(name, group, layer, operation)

    def linear(name: str, n_in: int, n_out: int) -> Step:
        return step(name, "linear", Operation("linear", ((sequence_length, n_in), (n_in, n_out))))

    def norm(name: str) -> Iterator[Step]:
        if config.norm != "none":
            yield step(name, "norm", norm_operation(config, config.norm, sequence_length))

    yield from norm("attention norm")
    if config.norm == "constant_std":
        yield from norm("value norm")
    yield linear("query projection", config.n_embd, query_width)
    yield linear("key projection", config.n_embd, key_width)
    yield linear("value projection", config.n_embd, key_width)
    if config.position == "rotary":
        for name, n_head in (("query rotation", heads), ("key rotation", config.n_kv_head)):
            table = (sequence_length, n_rotated(config))
            turned = Operation(
                "rotary", ((n_head, sequence_length, config.head_dim),), public=(("cos", table), ("sin", table))
            )
            yield step(name, "other", turned)
    head, square = (heads, sequence_length, config.head_dim), (heads, sequence_length, sequence_length)
    yield step("attention scores", "attention products", Operation("attention_scores", (head, head)))
    yield step("softmax", "softmax", Operation("softmax", (square,)))
    yield step("attention output", "attention products", Operation("attention_output", (square, head)))
    yield linear("output projection", query_width, config.n_embd)
    yield from norm("FFN norm")
    yield linear("up projection", config.n_embd, config.n_inner)
    if config.ffn == "gated":
        yield linear("gate projection", config.n_embd, config.n_inner)
    name = config.activations[layer]
    yield step(
        "activation", "activation", activation_operation(name, sequence_length, config.n_inner, config.negative_slope)
    )
    if config.ffn == "gated":
        yield step(
            "gating",
            "other",
            Operation("multiply", ((sequence_length, config.n_inner), (sequence_length, config.n_inner))),
        )
    yield linear("down projection", config.n_inner, config.n_embd)


def model_steps(config: NormfreeConfig, sequence_length: int, *, blocks_only: bool = False) -> list[Step]:
    """The operations of the whole model, from one-hot tokens to the logits of all ``sequence_length`` positions.

    Raises:
        InputError: the model has no encrypted counterpart.
    """
    steps = [step for layer in range(config.n_layer) for step in block_steps(config, layer, sequence_length)]
    if blocks_only:
        return steps
    embedding = Operation("linear", ((sequence_length, config.vocab_size), (config.vocab_size, config.n_embd)))
    unembedding = Operation("linear", ((sequence_length, config.n_embd), (config.n_embd, config.vocab_size)))
    final = []
    if config.final_norm != "none":
        final = [Step("final norm", "norm", None, norm_operation(config, config.final_norm, sequence_length))]
    return [
        Step("embedding", "linear", None, embedding),
        *steps,
        *final,
        Step("unembedding", "linear", None, unembedding),
    ]


def norm_operation(config: NormfreeConfig, name: str, sequence_length: int) -> Operation:
    """The norm called ``name`` on [T, n_embd]."""
    x, row = (sequence_length, config.n_embd), (config.n_embd,)
    kind = NORM_KINDS[name]
    if kind == "layernorm":
        return Operation(kind, (x, row, row), (("eps", config.norm_eps),))
    if kind == "rmsnorm":
        return Operation(kind, (x, row), (("eps", config.norm_eps),))
    if kind == "dyt":
        return Operation(kind, (x, (1,), row, row))
    rows = (row, row) if config.norm_is_centered else (row,)
    return Operation(kind, (x, *rows), (("is_centred", config.norm_is_centered),))


def activation_operation(name: str, sequence_length: int, width: int, negative_slope: float | None) -> Operation:
    """The activation called ``name`` on [T, width]."""
    x = (sequence_length, width)
    if name == "leaky_relu":
        assert negative_slope is not None, "the configuration sets it for every leaky activation"
        return Operation(name, (x,), (("negative_slope", negative_slope),))
    return Operation(name, (x, (1,)) if name == "learnable_leaky_relu" else (x,))


def alternatives(config: NormfreeConfig, sequence_length: int) -> list[tuple[str, str, Operation]]:
    """Every norm on [T, n_embd] and activation on [T, n_inner], whatever the model has: label, group, operation."""
    quantile = NormalDist().inv_cdf(1 - SPARK_SHARE)
    scaling = Operation(
        "constant_scaling", ((sequence_length, config.n_embd), (config.n_embd,)), (("is_centred", False),)
    )
    norms = [
        ("LayerNorm", norm_operation(config, "layernorm", sequence_length)),
        ("RMSNorm", norm_operation(config, "rmsnorm", sequence_length)),
        ("constant scaling", scaling),
        ("DyT", norm_operation(config, "dyt", sequence_length)),
    ]
    labels = {
        "gelu": "GELU, exact",
        "gelu_tanh": "GELU, tanh",
        "gelu_piecewise": "GELU, piecewise",
        "silu": "SiLU",
        "relu": "ReLU",
        "relu_squared": "ReLU squared",
        "leaky_relu": "leaky ReLU",
        "learnable_leaky_relu": "leaky ReLU, secret slope",
    }
    activations = [
        (label, activation_operation(name, sequence_length, config.n_inner, config.negative_slope or 0.01))
        for name, label in labels.items()
    ]
    threshold = Operation("statistical_topk", ((sequence_length, config.n_inner),), (("quantile", quantile),))
    return [
        *((label, "norm", operation) for label, operation in norms),
        *((label, "activation", operation) for label, operation in activations),
        ("Spark's threshold", "activation", threshold),
    ]


def n_rotated(config: NormfreeConfig) -> int:
    """Dimensions of a head that rotary positions turn."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
