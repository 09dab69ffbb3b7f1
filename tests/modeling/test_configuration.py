"""What the configuration refuses, what it fills in, and that it survives being written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from normfree import NormfreeConfig
from normfree.errors import InputError
from normfree.modeling.blocks import PLACEMENTS

ROTARY: dict[str, Any] = {"position": "rotary"}
MIXED: dict[str, Any] = {"n_layer": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}

REFUSED: list[tuple[dict[str, Any], str]] = [
    # unknown names, with the nearest one
    (
        {"norm": "layer_norm"},
        "unknown norm 'layer_norm' (did you mean 'layernorm'?); allowed: none, layernorm",
    ),
    ({"final_norm": "rms_norm"}, "unknown final_norm 'rms_norm' (did you mean 'rmsnorm'?)"),
    ({"norm_placement": "pree"}, "unknown norm_placement 'pree' (did you mean 'pre'?)"),
    ({"ffn": "gate"}, "unknown ffn 'gate' (did you mean 'gated'?)"),
    ({"attention": "softmaxx"}, "unknown attention 'softmaxx' (did you mean 'softmax'?)"),
    (
        {"qk_norm": "rms_norm"},
        "unknown qk_norm 'rms_norm' (did you mean 'rmsnorm'?); allowed: none, layernorm, rmsnorm, "
        "rmsnorm_full_width, layernorm_per_head",
    ),
    ({"attention_bias": "qkvo"}, "unknown attention_bias 'qkvo' (did you mean 'qkv'?)"),
    ({"position": "rotery"}, "unknown position 'rotery' (did you mean 'rotary'?); allowed: learned, rotary"),
    ({"activation": "leaky-relu"}, "unknown activation 'leaky-relu' (did you mean 'leaky_relu'?)"),
    ({"n_layer": 2, "activation": ["gelu", "rellu"]}, "unknown activation 'rellu' (did you mean 'relu'?)"),
    (
        {"activation": "learnable_leaky_relu", "slope_sharing": "globl"},
        "unknown slope_sharing 'globl' (did you mean 'global'?); allowed: layer, global",
    ),
    ({"activation": "zzz"}, "unknown activation 'zzz'; allowed: gelu, gelu_tanh, relu,"),
    # sizes
    *(
        ({option: value}, f"{option} is {value}; it must be at least 1")
        for option in ("vocab_size", "n_positions", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim")
        for value in (0, -2)
    ),
    ({"n_inner": 0}, "n_inner is 0; it must be at least 1"),
    ({"n_embd": 10, "n_head": 4}, "n_embd (10) is not divisible by n_head (4)"),
    ({"n_head": 12, "n_kv_head": 5}, "n_head (12) is not divisible by n_kv_head (5)"),
    ({"n_layer": 3, "activation": ["gelu"] * 2}, "activation lists 2 names for n_layer = 3"),
    ({"n_layer": 3, "activation": ["gelu"] * 4}, "activation lists 4 names for n_layer = 3"),
    ({"activation": []}, "activation lists 0 names for n_layer = 12"),
    # numbers
    *(
        ({option: value}, f"{option} is {value}; it must be in [0, 1)")
        for option in ("embedding_dropout", "attention_dropout", "residual_dropout")
        for value in (-0.1, 1.0, 1, float("nan"))
    ),
    *(
        ({option: value}, f"{option} is {value}; it must be positive and finite")
        for option in (
            "norm_eps",
            "initializer_range",
            "attention_scale",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "embedding_multiplier",
        )
        for value in (0.0, -1e-5, float("nan"), float("inf"))
    ),
    (
        {"activation": "leaky_relu", "negative_slope": float("nan")},
        "negative_slope is nan; it must be finite",
    ),
    # options that mean nothing beside the others
    ({"negative_slope": 0.1}, "negative_slope means nothing for activation 'gelu'"),
    ({"n_layer": 1, "activation": ["relu"], "negative_slope": 0.1}, "negative_slope means nothing for"),
    ({"slope_sharing": "global"}, "slope_sharing means nothing for activation 'gelu'"),
    ({"activation": "leaky_relu", "slope_sharing": "layer"}, "slope_sharing means nothing"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters mean nothing with position 'learned'"),
    ({**ROTARY, "positions_skip_padding": True}, "positions_skip_padding means nothing with position 'rotary'"),
    (
        {"scale_embeddings": True, "embedding_multiplier": 2.0},
        "scale_embeddings learns the factor that embedding_multiplier fixes; give one of them",
    ),
    *(
        ({"attention": "spark", option: 2.0}, f"{option} is not defined for attention 'spark'")
        for option in ("attention_scale", "attn_logit_softcapping")
    ),
    *(
        (
            {"norm_placement": placement, "parallel_residual": True},
            f"parallel_residual is defined for norm_placement pre only, not '{placement}'",
        )
        for placement in PLACEMENTS
        if placement != "pre"
    ),
    *(
        ({"norm_placement": placement, "norm": norm}, message)
        for placement in PLACEMENTS
        if placement != "pre"
        for norm, message in (
            ("none", f"norm_placement '{placement}' means nothing for norm 'none'"),
            ("layernorm_scaling", f"norm layernorm_scaling is defined for norm_placement pre only, not '{placement}'"),
            ("rmsnorm_scaling", f"norm rmsnorm_scaling is defined for norm_placement pre only, not '{placement}'"),
        )
    ),
    ({"final_norm": "layernorm_scaling"}, "the final norm is in no layer; use layernorm"),
    ({"final_norm": "rmsnorm_scaling"}, "the final norm is in no layer; use rmsnorm"),
    ({"dyt_alpha": 0.5}, "dyt_alpha means nothing for norm 'layernorm' and final_norm 'layernorm'"),
    ({"dyt_attention_alpha": 0.5}, "dyt_attention_alpha means nothing for norm 'layernorm'"),
    ({"final_norm": "dyt", "dyt_attention_alpha": 0.5}, "dyt_attention_alpha means nothing for norm 'layernorm'"),
    *(
        ({"norm": "dyt", option: value}, f"{option} is {value}; it must be positive and finite")
        for option in ("dyt_alpha", "dyt_attention_alpha")
        for value in (0.0, -1, float("nan"), float("inf"))
    ),
    ({"derf_alpha": 0.5}, "derf_alpha means nothing for norm 'layernorm' and final_norm 'layernorm'"),
    ({"norm": "dyt", "derf_shift": 0.5}, "derf_shift means nothing for norm 'dyt' and final_norm 'layernorm'"),
    *(({"norm": "derf", "derf_alpha": value}, f"derf_alpha is {value}; it must be positive") for value in (0.0, -1)),
    ({"norm": "derf", "derf_shift": float("inf")}, "derf_shift is inf; it must be finite"),
    ({"n_post_layer": 3}, "n_post_layer means nothing for norm_placement 'pre'; leave it out, or use mix"),
    ({"norm_placement": "post", "n_post_layer": 3}, "n_post_layer means nothing for norm_placement 'post'"),
    *(
        (
            {"norm_placement": "mix", "n_layer": 4, "n_post_layer": n},
            f"n_post_layer is {n} of n_layer = 4; mix has both kinds of blocks: it must be from 1 to n_layer - 1",
        )
        for n in (-1, 0, 4, 5)
    ),
    ({"norm_placement": "mix", "n_layer": 1}, "n_post_layer is 1 of n_layer = 1"),
    ({"norm_placement": "hybrid", "qk_norm": "rmsnorm"}, "qk_norm means nothing for norm_placement 'hybrid'"),
    ({"norm_placement": "hybrid_star", "qk_norm": True}, "qk_norm means nothing for norm_placement 'hybrid_star'"),
    (
        {"norm_placement": "deepnorm", "scale_residual_init": True},
        "scale_residual_init means nothing for norm_placement 'deepnorm'",
    ),
    # rotary positions
    (
        {**ROTARY, "rope_parameters": {"rope_type": "liner"}},
        "unknown rope_type 'liner' (did you mean 'linear'?)",
    ),
    ({**ROTARY, "rope_parameters": {"rope_thta": 1e4}}, "'rope_thta' (did you mean 'rope_theta'?)"),
    ({**ROTARY, "rope_parameters": {"rope_type": "linear"}}, "Missing required keys"),
    ({**ROTARY, "rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; it must be a positive"),
    (
        {**ROTARY, "rope_parameters": {"rope_theta": 0}},
        "rope_theta is 0; it must be a positive, finite number",
    ),
    ({**ROTARY, "rope_parameters": {"partial_rotary_factor": 1.5}}, "names 96 of the head_dim = 64"),
    ({**ROTARY, "rope_parameters": {"partial_rotary_factor": 0.001}}, "names 0 of the head_dim = 64"),
    (
        {**ROTARY, **MIXED, "rope_parameters": {"full_attention": {}}},
        "rope_parameters have no set for sliding_attention, which layer_types has; give one for each kind",
    ),
    (
        {**ROTARY, "rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
        "rope_parameters of sliding_attention mean nothing: layer_types has no such layer",
    ),
    (
        {**ROTARY, **MIXED, "rope_parameters": {"full_attention": {}, "sliding_atention": {}}},
        "unknown layer type in rope_parameters 'sliding_atention' (did you mean 'sliding_attention'?)",
    ),
    (
        {**ROTARY, **MIXED, "rope_parameters": {"full_attention": {}, "sliding_attention": None}},
        "rope_parameters of sliding_attention are None; give a dictionary",
    ),
    (
        {**ROTARY, **MIXED, "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": -1}}},
        "rope_theta is -1; it must be a positive, finite number",
    ),
    (
        {**ROTARY, **MIXED, "rope_parameters": {"full_attention": {"rope_type": "linear"}, "sliding_attention": {}}},
        "Missing required keys",
    ),
    ({**ROTARY, "n_embd": 36, "n_head": 4}, "names 9 of the head_dim = 9; use an even head_dim"),
]

WRONG_TYPES: list[tuple[str, Any]] = [
    ("n_layer", "3"),
    ("n_layer", 3.0),
    ("n_layer", None),
    ("n_head", True),
    ("norm", None),
    ("norm", ["layernorm"]),
    ("norm_eps", "1e-5"),
    ("activation", 3),
    ("activation", ["gelu", 3]),
    ("attention_bias", None),
    ("mlp_bias", "yes"),
    ("rope_parameters", [1]),
    ("residual_dropout", "0.1"),
    ("n_post_layer", 0.25),
    ("dyt_alpha", "0.5"),
    ("qk_norm", 1),
    ("ffn_active", "0.1"),
    ("attention_predictor_dim", [4]),
    ("bos_token_id", "<s>"),
    ("sliding_window", "4"),
    ("layer_types", "full_attention"),
]

NOT_DEFAULT: dict[str, Any] = {
    "vocab_size": 101,
    "n_positions": 33,
    "n_layer": 3,
    "n_head": 6,
    "n_kv_head": 3,
    "n_embd": 48,
    "head_dim": 10,
    "n_inner": 77,
    "norm": "dyt",
    "norm_placement": "mix",
    "final_norm": "constant_std",
    "norm_eps": 1e-3,
    "norm_is_centered": False,
    "final_norm_is_centered": True,
    "dyt_alpha": 0.3,
    "dyt_attention_alpha": 0.7,
    "derf_alpha": 0.8,
    "derf_shift": -0.2,
    "n_post_layer": 2,
    "parallel_residual": True,
    "ffn": "spark",
    "ffn_active": 0.3,
    "ffn_predictor_dim": 11,
    "activation": ["learnable_leaky_relu", "silu", "relu"],
    "negative_slope": 0.25,
    "slope_sharing": "global",
    "mlp_bias": False,
    "attention": "spark",
    "attention_active": 7,
    "attention_predictor_dim": 5,
    "topk": "exact",
    "attention_bias": "qk",
    "qk_norm": "rmsnorm",
    "qk_norm_is_constant": True,
    "attention_scale": 0.2,
    "attn_logit_softcapping": 30.0,
    "position": "rotary",
    "positions_skip_padding": True,
    "rope_parameters": {
        "rope_type": "linear",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.4,
        "factor": 2.0,
    },
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.07,
    "scale_residual_init": True,
    "scale_embeddings": True,
    "embedding_multiplier": 1.5,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.2,
    "residual_dropout": 0.3,
    "tie_word_embeddings": False,
    "lm_head_bias": True,
    "final_logit_softcapping": 20.0,
    "use_cache": False,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
}


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(options: dict[str, Any], message: str) -> None:
    for make in (NormfreeConfig.from_options, lambda options: NormfreeConfig(**options)):
        with pytest.raises(InputError) as error:
            make(options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value"), WRONG_TYPES, ids=str)
def test_wrong_types_are_refused(option: str, value: Any) -> None:
    sizes = {"n_layer": 2} if option != "n_layer" else {}
    with pytest.raises(InputError, match=f"'{option}'") as error:
        NormfreeConfig.from_options({**sizes, option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("n_layers", "n_layer"), ("activations", "activation"), ("layer_norm", "final_norm")],
)
def test_unknown_options_are_refused(option: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown model option '{option}' .did you mean '{nearest}'"):
        NormfreeConfig.from_options({option: 1})


def test_round_trips_cover_every_option() -> None:
    assert sorted(NOT_DEFAULT) == sorted(NormfreeConfig.option_names())
    default = NormfreeConfig()
    same = {option for option, value in NOT_DEFAULT.items() if getattr(default, option) == value}
    assert not same


def round_trips(config: NormfreeConfig, folder: Path) -> list[NormfreeConfig]:
    config.save_pretrained(folder)
    return [
        NormfreeConfig.from_dict(config.to_dict()),
        NormfreeConfig.from_dict(json.loads(config.to_json_string())),
        NormfreeConfig.from_options({option: getattr(config, option) for option in config.option_names()}),
        NormfreeConfig.from_pretrained(folder),
        AutoConfig.from_pretrained(folder),
    ]


@pytest.mark.parametrize("option", NOT_DEFAULT)
def test_round_trip_of_one_option(option: str, tmp_path: Path) -> None:
    needed = {
        "activation": ("n_layer",),
        "norm_is_centered": ("final_norm",),
        "final_norm_is_centered": ("final_norm", "norm_is_centered"),
        "qk_norm_is_constant": ("qk_norm",),
        "dyt_alpha": ("norm",),
        "dyt_attention_alpha": ("norm",),
        "n_post_layer": ("n_layer", "norm_placement"),
        "negative_slope": ("n_layer", "activation"),
        "slope_sharing": ("n_layer", "activation"),
        "n_kv_head": ("n_head", "n_embd"),
        "n_head": ("n_embd",),
        "rope_parameters": ("position",),
        "ffn_active": ("ffn",),
        "ffn_predictor_dim": ("ffn",),
        "attention_active": ("attention",),
        "attention_predictor_dim": ("attention",),
        "topk": ("attention",),
        "layer_types": ("n_layer", "sliding_window"),
    }
    options = {each: NOT_DEFAULT[each] for each in (*needed.get(option, ()), option)}
    if option.startswith("derf_"):
        options["norm"] = "derf"
    config = NormfreeConfig(**options)
    assert getattr(config, option) == NOT_DEFAULT[option]
    for other in round_trips(config, tmp_path):
        assert type(other) is NormfreeConfig
        for name in NormfreeConfig.option_names():
            assert getattr(other, name) == getattr(config, name), name


@pytest.mark.parametrize(
    "left_out",
    [
        (
            *("norm_placement", "n_post_layer", "activation", "negative_slope", "slope_sharing"),
            *("attention_scale", "attn_logit_softcapping", "positions_skip_padding", "scale_embeddings"),
            *("sliding_window", "layer_types"),
        ),
        (
            *("parallel_residual", "ffn", "ffn_active", "ffn_predictor_dim", "topk", "embedding_multiplier"),
            *("attention", "attention_active", "attention_predictor_dim", "position", "rope_parameters"),
        ),
    ],
)
def test_round_trip_of_all_options_together(left_out: tuple[str, ...], tmp_path: Path) -> None:
    of_another_norm = ("derf_alpha", "derf_shift")
    options = {key: each for key, each in NOT_DEFAULT.items() if key not in (*left_out, *of_another_norm)}
    config = NormfreeConfig(**options)
    for other in round_trips(config, tmp_path):
        for name, value in options.items():
            assert getattr(other, name) == value, name


def test_defaults_are_filled_in() -> None:
    config = NormfreeConfig(n_layer=2, n_head=4, n_embd=32, activation=["relu", "learnable_leaky_relu"])
    assert (config.n_kv_head, config.head_dim, config.n_inner) == (4, 8, 128)
    assert (config.negative_slope, config.slope_sharing) == (0.01, "layer")
    assert config.activations == ["relu", "learnable_leaky_relu"]
    assert NormfreeConfig(activation="leaky_relu").negative_slope == 0.01
    assert NormfreeConfig().negative_slope is None
    assert NormfreeConfig().slope_sharing is None
    assert NormfreeConfig(attention_bias=True).attention_bias == "all"  # type: ignore[arg-type]
    assert NormfreeConfig(attention_bias=False).attention_bias == "none"  # type: ignore[arg-type]
    assert NormfreeConfig(head_dim=5, n_head=3, n_embd=16).head_dim == 5
    dyt = NormfreeConfig(norm="dyt")
    assert (dyt.dyt_alpha, dyt.dyt_attention_alpha) == (0.5, 0.5)
    assert (NormfreeConfig(final_norm="dyt").dyt_alpha, NormfreeConfig(final_norm="dyt").dyt_attention_alpha) == (
        0.5,
        None,
    )
    assert NormfreeConfig().dyt_alpha is None
    derf = NormfreeConfig(final_norm="derf")
    assert (derf.derf_alpha, derf.derf_shift, derf.dyt_alpha) == (0.5, 0.0, None)
    assert NormfreeConfig().n_post_layer is None
    assert NormfreeConfig().rope_parameters is None
    assert NormfreeConfig(n_layer=2).layer_types == ["full_attention"] * 2
    assert NormfreeConfig(n_layer=2, sliding_window=3).layer_types == ["sliding_attention"] * 2
    assert NormfreeConfig(position="rotary").rope_parameters == {
        "rope_type": "default",
        "rope_theta": 10000.0,
    }


def test_transformers_names_of_the_sizes() -> None:
    config = NormfreeConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=50, n_positions=64)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [getattr(config, name) for name in names] == [32, 4, 2, 3]
    assert (config.intermediate_size, config.max_position_embeddings) == (50, 64)


def test_the_caller_keeps_its_dictionary() -> None:
    parameters = {"partial_rotary_factor": 0.25}
    NormfreeConfig(position="rotary", rope_parameters=parameters)
    assert parameters == {"partial_rotary_factor": 0.25}


@pytest.mark.parametrize(("n_layer", "n_post_layer"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 3), (24, 6), (32, 8)])
def test_a_quarter_of_the_layers_of_mix_are_post(n_layer: int, n_post_layer: int) -> None:
    """12 and 24 layers: the counts of the public code of Mix-LN."""
    assert NormfreeConfig(norm_placement="mix", n_layer=n_layer).n_post_layer == n_post_layer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"qk_norm": False}, {}),
        ({"qk_norm": True}, {"q": "layernorm", "k": "layernorm"}),
        ({"qk_norm": True, "norm": "layernorm_scaling"}, {"q": "layernorm", "k": "layernorm"}),
        ({"qk_norm": True, "norm": "rmsnorm"}, {"q": "rmsnorm", "k": "rmsnorm"}),
        ({"qk_norm": True, "norm": "none"}, {"q": "rmsnorm", "k": "rmsnorm"}),
        ({"qk_norm": "layernorm", "norm": "rmsnorm"}, {"q": "layernorm", "k": "layernorm"}),
        ({"norm_placement": "hybrid"}, {"q": "layernorm", "k": "layernorm", "v": "layernorm"}),
        ({"norm_placement": "hybrid_star", "norm": "dyt"}, {"q": "dyt", "k": "dyt", "v": "dyt"}),
    ],
)
def test_norms_of_the_heads(options: dict[str, Any], expected: dict[str, str]) -> None:
    assert NormfreeConfig(**options).head_norms == expected


def test_rotary_parameters_by_kind_of_layer(tmp_path: Path) -> None:
    given = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}
    config = NormfreeConfig(**ROTARY, **MIXED, rope_parameters=given)
    assert given == {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}
    expected = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config.rope_parameters == expected
    for other in round_trips(config, tmp_path):
        assert other.rope_parameters == expected
    one = NormfreeConfig(**ROTARY, rope_parameters={"full_attention": {"rope_theta": 7.0}})
    assert one.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_configurations_saved_before_an_option_was_added_still_load(tmp_path: Path) -> None:
    """Such a file lacks the option, and the model was made without it."""
    added = {
        *("attention_scale", "attn_logit_softcapping", "embedding_multiplier", "final_logit_softcapping"),
        *("positions_skip_padding", "sliding_window", "layer_types"),
    }
    for options in ({}, {**ROTARY, "rope_parameters": {"rope_theta": 7.0}}):
        config = NormfreeConfig(n_layer=2, **options)
        saved = {name: value for name, value in config.to_dict().items() if name not in added}
        (tmp_path / "config.json").write_text(json.dumps(saved))
        loaded = AutoConfig.from_pretrained(tmp_path)
        for name in NormfreeConfig.option_names():
            assert getattr(loaded, name) == getattr(config, name), name
