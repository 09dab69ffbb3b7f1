"""The decoder as a transformers model: saving, generation, compilation, slopes, initial weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling import NormfreeModel
from normfree.modeling.activations import ACTIVATIONS
from normfree.modeling.blocks import PLACEMENTS
from normfree.modeling.cache_keyword import CACHE
from normfree.modeling.norms import NORMS, SCALED_NORMS

from . import reference

SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 16}
GLOBAL_SLOPE: dict[str, Any] = {"activation": "learnable_leaky_relu", "slope_sharing": "global"}
NORMS_OF_EVERY_PLACEMENT = ("layernorm", "rmsnorm", "dyt")
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "parallel": {"parallel_residual": True, "tie_word_embeddings": False},
    "norm-free": {"norm": "none", "final_norm": "none", **GLOBAL_SLOPE},
    "norm-free-with-qk-norm": {"norm": "none", "final_norm": "none", "qk_norm": True},
    **{
        f"{placement}-{norm}": {"norm": norm, "norm_placement": placement}
        for placement in PLACEMENTS
        for norm in NORMS
        if (placement, norm) not in {("pre", "layernorm"), ("post", "layernorm"), ("pre", "constant_std")}
        and (placement == "pre" or norm in NORMS_OF_EVERY_PLACEMENT)
    },
    "dyt-everywhere": {"norm": "dyt", "final_norm": "dyt", "dyt_attention_alpha": 0.8, "scale_embeddings": True},
    "derf-everywhere": {"norm": "derf", "final_norm": "derf", "derf_shift": 0.1, "scale_embeddings": True},
    "qk-norm-scaling": {"norm": "rmsnorm_scaling", "final_norm": "rmsnorm", "qk_norm": "layernorm", "n_kv_head": 2},
    "grouped-gated": {"n_kv_head": 2, "ffn": "gated", "norm": "rmsnorm", "activation": "silu"},
    "gemma-3": {
        "norm": "rmsnorm",
        "final_norm": "rmsnorm",
        "norm_placement": "sandwich",
        "ffn": "gated",
        "qk_norm": "rmsnorm",
        "embedding_multiplier": 4.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "soft-capped": {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "embedding_multiplier": 4.0,
        "attention_scale": 0.3,
    },
}


def build(**options: Any) -> NormfreeForCausalLM:
    return NormfreeForCausalLM(NormfreeConfig(**{**SIZES, **options}))


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(1))


def slopes(model: NormfreeForCausalLM) -> list[torch.nn.Parameter]:
    return [block.ffn.activation.negative_slope for block in model.model.blocks]


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@torch.no_grad()
def test_save_and_load_with_auto_classes(arrangement: str, position: str, tmp_path: Path) -> None:
    model = reference.perturb(build(position=position, **ARRANGEMENTS[arrangement])).eval()
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"model.safetensors", "config.json", "generation_config.json"}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NormfreeForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is NormfreeModel
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@torch.no_grad()
def test_cached_generation_equals_uncached(arrangement: str, position: str) -> None:
    model = reference.perturb(build(position=position, **ARRANGEMENTS[arrangement])).eval()
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    cached, uncached = (
        model.generate(tokens(), attention_mask=mask, use_cache=use_cache, output_logits=True, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert len(cached.sequences[0].unique()) > 2
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-5)
    greedy = model(cached.sequences[:1, :-1]).logits[0, -12:].argmax(-1)
    assert torch.equal(greedy, cached.sequences[0, -12:])


@torch.no_grad()
def test_a_cache_has_two_names_of_which_one_is_given() -> None:
    model, ids = build().eval(), torch.randint(0, 13, (2, 9))
    whole = model(ids, use_cache=False).logits
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :5], **{name: cache})
        assert getattr(first, CACHE) is cache
        logits = torch.cat([first.logits, model(ids[:, 5:], **{name: cache}).logits], dim=1)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="two names for one thing"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_gradient_checkpointing_changes_no_gradient(arrangement: str) -> None:
    model = build(residual_dropout=0.1, attention_dropout=0.1, **ARRANGEMENTS[arrangement]).double().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        model(tokens(), labels=tokens()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    recomputed = 0

    def count(*_: Any) -> None:
        nonlocal recomputed
        recomputed += 1

    model.model.blocks[0].ffn.register_forward_hook(count)
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert recomputed == 2
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0 or "k_proj.bias" in name, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_training_step_in_bf16_autocast(arrangement: str, implementation: str) -> None:
    """Heads are normalized in bf16, residual streams in float32: what comes out of norms may be of either dtype."""
    model = build(**ARRANGEMENTS[arrangement]).train()
    if model.config.attn_logit_softcapping is None:
        model.set_attn_implementation(implementation)
    expected = model(tokens(), labels=tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(tokens(), labels=tokens()).loss
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0)
    actual.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arrangement", "position"), [("pre", "learned"), ("parallel", "rotary"), ("norm-free", "learned")]
)
def test_training_step_compiles_without_graph_breaks(arrangement: str, position: str) -> None:
    """``fullgraph=True`` raises at the first graph break."""
    check_compiled_step(build(position=position, residual_dropout=0.1, **ARRANGEMENTS[arrangement]), "aot_eager")


@pytest.mark.parametrize(
    "arrangement",
    [
        *(each for each in ARRANGEMENTS if each.startswith("pre-")),
        *(f"{placement}-rmsnorm" for placement in PLACEMENTS if placement != "pre"),
        *("dyt-everywhere", "hybrid-dyt", "norm-free-with-qk-norm"),
    ],
)
def test_every_norm_and_placement_is_traced_without_graph_breaks(arrangement: str) -> None:
    n_layer = 2 if arrangement.startswith(("mix", "hybrid_star")) else 1
    check_compiled_step(build(**{**ARRANGEMENTS[arrangement], "n_layer": n_layer}), "eager")


def check_compiled_step(model: NormfreeForCausalLM, backend: str) -> None:
    torch.compiler.reset()
    model.train()

    def step(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    torch.manual_seed(7)
    expected = step(tokens())
    torch.manual_seed(7)
    actual = torch.compile(step, fullgraph=True, backend=backend)(tokens())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    actual.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_global_slope_is_one_parameter(tie_word_embeddings: bool, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=tie_word_embeddings, **GLOBAL_SLOPE)
    per_layer = build(tie_word_embeddings=tie_word_embeddings, activation="learnable_leaky_relu")
    assert len({id(slope) for slope in slopes(per_layer)}) == 3
    with torch.no_grad():
        slopes(model)[0].fill_(0.37)
    model.save_pretrained(tmp_path)
    loaded = NormfreeForCausalLM.from_pretrained(tmp_path)
    for each in (model, deepcopy(model), loaded):
        assert len({id(slope) for slope in slopes(each)}) == 1
        assert slopes(each)[2].item() == pytest.approx(0.37)
        assert sum(parameter is slopes(each)[1] for parameter in each.parameters()) == 1
        counted = sum(parameter.numel() for parameter in each.parameters())
        assert counted == sum(parameter.numel() for parameter in per_layer.parameters()) - 2
    model.resize_token_embeddings(23)
    assert len({id(slope) for slope in slopes(model)}) == 1


def test_global_slope_joins_only_the_layers_that_have_one() -> None:
    model = build(activation=["learnable_leaky_relu", "gelu", "learnable_leaky_relu"], slope_sharing="global")
    first, _, last = (block.ffn.activation for block in model.model.blocks)
    assert first.negative_slope is last.negative_slope


def test_gradient_of_the_global_slope_is_the_sum_over_layers() -> None:
    shared = build(**GLOBAL_SLOPE)
    separate = build(activation="learnable_leaky_relu")
    separate.load_state_dict(shared.state_dict())
    for model in (shared, separate):
        model(tokens(), labels=tokens()).loss.backward()
    expected = torch.stack([slope.grad for slope in slopes(separate) if slope.grad is not None]).sum(0)
    torch.testing.assert_close(slopes(shared)[0].grad, expected, rtol=1e-5, atol=1e-8)


def test_slopes_start_at_the_configured_value() -> None:
    assert [slope.item() for slope in slopes(build(activation="learnable_leaky_relu"))] == [pytest.approx(0.01)] * 3
    model = build(activation="learnable_leaky_relu", negative_slope=-0.3)
    assert [slope.item() for slope in slopes(model)] == [pytest.approx(-0.3)] * 3


def initial_weights(**options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    weights = build(**options).state_dict()
    return {name: tensor for name, tensor in weights.items() if "norm" not in name and "slope" not in name}


def test_initial_weights_depend_on_neither_norm_nor_placement_nor_activation() -> None:
    expected = initial_weights()
    changes: tuple[dict[str, Any], ...] = (
        *({"norm": name} for name in NORMS),
        *({"final_norm": name} for name in NORMS if name not in SCALED_NORMS),
        *({"activation": name} for name in ACTIVATIONS),
        *({"norm_placement": name} for name in PLACEMENTS if name != "deepnorm"),
        {"qk_norm": True},
        {"parallel_residual": True},
        GLOBAL_SLOPE,
    )
    for options in changes:
        actual = initial_weights(**options)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), (options, name)


@pytest.mark.parametrize("scale_residual_init", [False, True])
@pytest.mark.parametrize("ffn", ["dense", "gated"])
def test_statistics_of_the_initial_weights(ffn: str, scale_residual_init: bool) -> None:
    """Standard deviations within five standard errors, 1/sqrt(2n) of the value each."""
    model = NormfreeForCausalLM(
        NormfreeConfig(
            vocab_size=300,
            n_positions=200,
            n_layer=8,
            n_head=2,
            n_embd=64,
            ffn=ffn,
            initializer_range=0.05,
            scale_residual_init=scale_residual_init,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "norm" in name:
            assert torch.all(parameter == 1), name
        else:
            into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.05 / 4 if scale_residual_init and into_the_stream else 0.05
            n = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 5 / (2 * n) ** 0.5, name
            assert abs(parameter.mean().item()) < 5 * std / n**0.5, name


@pytest.mark.parametrize("n_layer", [2, 3, 32])
@pytest.mark.parametrize("ffn", ["dense", "gated"])
def test_deepnorm_starts_values_output_and_ffn_beta_times_as_large(ffn: str, n_layer: int) -> None:
    """β = (8 N)^-¼ (DeepNet, Figure 2); from the same draws, so the other weights are the same."""
    expected = initial_weights(ffn=ffn, n_layer=n_layer)
    actual = initial_weights(ffn=ffn, n_layer=n_layer, norm_placement="deepnorm")
    assert actual.keys() == expected.keys()
    n_scaled = 0
    for name, tensor in expected.items():
        if name.endswith("proj.weight") and "q_proj" not in name and "k_proj" not in name:
            n_scaled += 1
            tensor = tensor / (8 * n_layer) ** (1 / 4)
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=0, msg=name)
    assert n_scaled == n_layer * (5 if ffn == "gated" else 4)


def test_deepnorm_loads_weights_as_they_were_saved(tmp_path: Path) -> None:
    model = build(norm_placement="deepnorm")
    model.save_pretrained(tmp_path)
    loaded = NormfreeForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_scaled_embeddings_start_at_the_root_of_the_width() -> None:
    assert build(scale_embeddings=True).model.embedding_scale.tolist() == [4.0]
    assert build().model.embedding_scale is None


def test_default_configuration_has_the_parameters_of_gpt2_small() -> None:
    with torch.device("meta"):
        model = NormfreeForCausalLM(NormfreeConfig())
    assert model.num_parameters() == 124_439_808  # Radford et al. 2019, as released


@pytest.mark.parametrize("option", ["embedding_dropout", "attention_dropout", "residual_dropout"])
@torch.no_grad()
def test_dropout_only_in_training(option: str) -> None:
    model = reference.perturb(build(**{option: 0.5}))
    without = build()
    without.load_state_dict(model.state_dict())
    expected = without.eval()(tokens()).logits
    assert torch.equal(model.eval()(tokens()).logits, expected)
    model.train()
    first, second = model(tokens()).logits, model(tokens()).logits
    assert not torch.allclose(first, expected, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(without.train()(tokens()).logits, expected)


@torch.no_grad()
def test_embeddings_as_input() -> None:
    model = build().eval()
    embedded = model.get_input_embeddings()(tokens())
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens()).logits)
    for wrong in ({}, {"input_ids": tokens(), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model = build().eval()
    whole = model(tokens()).logits
    torch.testing.assert_close(model(tokens(), logits_to_keep=2).logits, whole[:, -2:])
    kept = torch.tensor([0, 5])
    torch.testing.assert_close(model(tokens(), logits_to_keep=kept).logits, whole[:, kept])


@torch.no_grad()
def test_an_embedding_multiplier_is_the_embeddings_own() -> None:
    model: Any = build(embedding_multiplier=16**0.5 + 0.01).eval()
    model.to(torch.bfloat16)
    embedding = model.get_input_embeddings()
    rounded = torch.tensor(model.config.embedding_multiplier, dtype=torch.bfloat16)
    assert torch.equal(embedding(tokens()), embedding.weight[tokens()] * rounded)
    assert torch.equal(model(inputs_embeds=embedding(tokens())).logits, model(tokens()).logits)
    model.resize_token_embeddings(25)
    assert torch.equal(model.get_input_embeddings()(tokens()), embedding.weight[tokens()] * rounded)


@torch.no_grad()
def test_positions_that_skip_padding() -> None:
    model = reference.perturb(build(positions_skip_padding=True)).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone = model(ids[1:, 4:]).logits[0]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, 4:], alone, rtol=0, atol=1e-5)
    counted = build(positions_skip_padding=False)
    counted.load_state_dict(model.state_dict())
    assert not torch.allclose(counted.eval()(ids, attention_mask=mask).logits[1, 4:], alone, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, counted(ids).logits)

    cache = DynamicCache(config=model.config)
    steps = [
        model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True).logits
        for start, stop in ((0, 6), (6, 9), (9, 11))
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1)[1, 4:], alone, rtol=0, atol=1e-5)

    hole = torch.ones_like(ids)
    hole[:, 3:5] = 0
    positions = torch.tensor([[0, 1, 2, 0, 0, 3, 4, 5, 6, 7, 8]])
    expected = model(ids, attention_mask=hole, position_ids=positions).logits
    assert torch.equal(model(ids, attention_mask=hole).logits, expected)
    with pytest.raises(ValueError, match="with another mask give position_ids as well"):
        model(ids, attention_mask=torch.zeros(2, 1, 11, 11))


@torch.no_grad()
def test_rotary_parameters_by_kind_of_layer(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sets = {"full_attention": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}, "sliding_attention": {"rope_theta": 2}}
    options: dict[str, Any] = {"position": "rotary", "layer_types": kinds, "sliding_window": 4, "n_embd": 32}
    model = reference.perturb(build(**options, rope_parameters=sets)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model(tokens()).logits
    assert torch.equal(loaded(tokens()).logits, expected)
    for kind, other in (("full_attention", kinds[0]), ("sliding_attention", kinds[1])):
        changed = build(**options, rope_parameters={**sets, kind: sets[other]}).eval()
        changed.load_state_dict(model.state_dict())
        assert not torch.allclose(changed(tokens()).logits, expected, atol=1e-3)
    same = build(**options, rope_parameters={kind: {"rope_theta": 3.0} for kind in sets}).eval()
    flat = build(**options, rope_parameters={"rope_theta": 3.0}).eval()
    flat.load_state_dict(same.state_dict())
    assert torch.equal(flat(tokens()).logits, same(tokens()).logits)
