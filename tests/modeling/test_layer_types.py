"""Sliding windows and kinds of attention by layer: masks, caches, and what refuses them."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from normfree import EntropyProbe, NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.interpret.pruning import prune_layers
from normfree.modeling.cache_keyword import CACHE
from normfree.removal import to_stock
from normfree.training.objectives.entropy_regularization import EntropyRegularizationOptions

SIZES: dict[str, Any] = {"vocab_size": 19, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 16, "n_kv_head": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED: dict[str, Any] = {"sliding_window": 3, "layer_types": [SLIDING, FULL, SLIDING]}
WINDOWS: dict[str, dict[str, Any]] = {"all": {"sliding_window": 4}, "mixed": MIXED, "wide": {"sliding_window": 30}}
T = 11


def build(**options: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    return NormfreeForCausalLM(NormfreeConfig(**{**SIZES, "initializer_range": 0.3, **options})).eval()


def tokens(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(1))


def visible(kind: str, window: int | None, length: int = T) -> NDArray[np.bool_]:
    """Bool [T, T]: what the definition of each kind lets a query see."""
    query, key = np.indices((length, length))
    return (key <= query) & ((kind == FULL) | (query - key < (window or length)))


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_each_layer_sees_its_window(options: dict[str, Any], implementation: str, position: str) -> None:
    """A token's logits change with an earlier token's exactly where a path of visible keys leads."""
    model = build(**options, position=position).double()
    model.set_attn_implementation(implementation)
    reach = np.eye(T, dtype=bool)
    for kind in model.config.layer_types:
        reach = (visible(kind, model.config.sliding_window).astype(int) @ reach.astype(int)) > 0
    before = model(tokens(1)).logits[0]
    for changed in range(T):
        other = tokens(1)
        other[0, changed] = (other[0, changed] + 1) % 19
        difference = (model(other).logits[0] - before).abs().amax(-1)
        assert ((difference > 1e-12).numpy() == reach[:, changed]).all()


@torch.no_grad()
def test_weights_are_those_of_the_windows() -> None:
    model = build(**MIXED)
    model.set_attn_implementation("eager")
    for kind, weights in zip(model.config.layer_types, model(tokens(), output_attentions=True).attentions, strict=True):
        seen = torch.from_numpy(visible(kind, 3))
        assert (weights[..., ~seen] == 0).all()
        assert (weights[..., seen] > 0).all()


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_and_cache_change_no_logits(options: dict[str, Any], implementation: str) -> None:
    model = build(**options, position="rotary")
    model.set_attn_implementation(implementation)
    alone = model(tokens(1)).logits
    padded = torch.nn.functional.pad(tokens(1), (5, 0))
    mask = torch.nn.functional.pad(torch.ones(1, T, dtype=torch.int64), (5, 0))
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], alone, rtol=0, atol=1e-5)
    cache = None
    stepwise = []
    for step in tokens(1).split([5, 1, 2, 1, 2], dim=1):
        output = model(step, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        stepwise.append(output.logits)
    torch.testing.assert_close(torch.cat(stepwise, dim=1), alone, rtol=0, atol=1e-5)
    assert cache is not None
    kept = [layer.keys.shape[2] for layer in cache.layers]
    window = model.config.sliding_window
    assert window is not None
    assert kept == [min(T, window - 1) if kind == SLIDING else T for kind in model.config.layer_types]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_generation_with_each_cache(options: dict[str, Any], cache: str) -> None:
    model = build(**options)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens())
    expected = model.generate(tokens(), attention_mask=mask, use_cache=False, **arguments)
    actual = model.generate(
        tokens(), attention_mask=mask, cache_implementation=cache, disable_compile=True, **arguments
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_probe_knows_the_windows(options: dict[str, Any]) -> None:
    model = build(**options)
    eager = build(**options)
    eager.set_attn_implementation("eager")
    with EntropyProbe(model) as probe:
        model(tokens())
    for layer, weights in enumerate(eager(tokens(), output_attentions=True).attentions):
        w = weights.double()
        expected = -(w * w.clamp_min(1e-300).log()).sum(-1).mean((0, 2))
        torch.testing.assert_close(probe.per_head()[layer].double(), expected, rtol=0, atol=1e-5)
    for layer, kind in enumerate(model.config.layer_types):
        seen = visible(kind, model.config.sliding_window).sum(1)
        bound = sum(log(n) for n in seen) / T
        torch.testing.assert_close(probe.maximum()[layer].double(), torch.full((4,), bound).double(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_probe_reads_generation_with_a_sliding_cache() -> None:
    """Token by token, every query sees what it sees in one pass."""
    model = build(**MIXED)
    with EntropyProbe(model) as whole:
        model(tokens())
    with EntropyProbe(model) as stepwise:
        cache = None
        for step in tokens().split(1, dim=1):
            cache = model(step, use_cache=True, **{CACHE: cache})[CACHE]
    torch.testing.assert_close(stepwise.per_head(), whole.per_head(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stepwise.maximum(), whole.maximum(), rtol=1e-6, atol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build(**MIXED).train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@torch.no_grad()
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == model.config.layer_types
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_configurations_without_the_options_are_full_causal() -> None:
    saved = NormfreeConfig(**SIZES).to_dict()
    for option in ("sliding_window", "layer_types"):
        del saved[option]
    assert NormfreeConfig.from_dict(saved).layer_types == [FULL] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 1}, "sliding_window is 1; .* must be at least 2"),
        ({"sliding_window": 0}, "sliding_window is 0; .* must be at least 2"),
        ({"sliding_window": -4}, "sliding_window is -4"),
        ({"layer_types": [SLIDING, FULL, FULL]}, "needs a window; give sliding_window"),
        ({"layer_types": [FULL] * 3, "sliding_window": 4}, "sliding_window means nothing for layer_types without"),
        ({"layer_types": [FULL] * 2}, "layer_types lists 2 kinds for n_layer = 3"),
        ({"layer_types": [FULL, FULL, "chunked_attention"]}, "unknown layer type 'chunked_attention'"),
        ({"sliding_window": 4, "attention": "spark"}, "sliding_window is not defined for attention 'spark'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        NormfreeConfig(**{**SIZES, **options})
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_pruning_keeps_the_kinds_of_the_layers_that_are_left() -> None:
    model = build(**MIXED)
    assert prune_layers(model, [0]).config.layer_types == [FULL, SLIDING]
    full = prune_layers(model, [0, 2])
    assert full.config.layer_types == [FULL]
    assert full.config.sliding_window is None
    assert prune_layers(build(sliding_window=4), [1]).config.layer_types == [SLIDING] * 2


@torch.no_grad()
def test_a_block_keeps_its_kind_where_another_is_deleted_or_replaced() -> None:
    expected = prune_layers(build(**MIXED), [0])(tokens()).logits
    replaced = build(**MIXED)
    replaced.model.blocks[0] = torch.nn.Identity()
    replaced.model.blocks[0].forward = lambda x, **_: x
    torch.testing.assert_close(replaced(tokens()).logits, expected)
    deleted = build(**MIXED)
    del deleted.model.blocks[0]
    torch.testing.assert_close(deleted(tokens()).logits, expected)


def test_what_supposes_full_attention_refuses_windows(tmp_path: Path) -> None:
    model = build(sliding_window=4, norm="constant_std", final_norm="constant_std", n_kv_head=4)
    with pytest.raises(InputError, match="sliding_window = 4 has no counterpart in GPT-2"):
        to_stock(model)
    with pytest.raises(InputError, match=r"entropy_regularization .* sliding_window 4"):
        EntropyRegularizationOptions().build(model.config, tmp_path)
