"""What works on Normfree's models, on converted ones: done rightly, or refused by the name of the option."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from normfree import EntropyProbe, NormfreeForCausalLM, from_hf, remove_norms, sparse_decode
from normfree.errors import InputError
from normfree.interpret import direct_logit_attribution, measure_depth, prune_layers, quantization_cost
from normfree.interpret.depth.block_calls import record
from normfree.interpret.patching import PromptPairs, logit_difference, patch_heads
from normfree.removal import to_stock
from normfree.removal.midway import Midway
from normfree.removal.parts import QKNorms, parts_to_remove
from normfree.removal.schedule import automatic_schedule
from normfree.spark import to_spark
from tests.modeling.conversion.checks import assert_same, padding_mask, rope, tokens
from tests.modeling.conversion.test_gemma2 import TestGemma2 as Gemma2
from tests.modeling.conversion.test_gemma3 import MIXED
from tests.modeling.conversion.test_gemma3 import TestGemma3 as Gemma3
from tests.modeling.conversion.test_gptj import TestGPTJ as GptJ
from tests.modeling.conversion.test_mistral import TestMistral as Mistral
from tests.modeling.conversion.test_olmo2 import TestOlmo2 as Olmo2
from tests.modeling.conversion.test_opt import POST
from tests.modeling.conversion.test_opt import TestOPT as Opt
from tests.modeling.conversion.test_phi3 import TestPhi3 as Phi3
from tests.modeling.conversion.test_qwen2 import FULL, SLIDING
from tests.modeling.conversion.test_qwen2 import TestQwen2 as Qwen2
from tests.modeling.conversion.test_stablelm import TestStableLm as StableLm

MODELS: dict[str, Any] = {
    "gptj": GptJ.build,
    "opt": Opt.build,
    "opt-post": lambda: Opt.build(**POST),
    "gemma2": lambda: Gemma2.build(attn_logit_softcapping=0.5),
    "gemma3": lambda: Gemma3.build(layer_types=MIXED),
    "mistral": lambda: Mistral.build(sliding_window=4),
    "qwen2": lambda: Qwen2.build(use_sliding_window=True, sliding_window=3, layer_types=[SLIDING, FULL, SLIDING]),
    "phi3": lambda: Phi3.build(**rope("default", partial_rotary_factor=0.5)),
    "stablelm": StableLm.build,
    "stablelm-parallel": lambda: StableLm.build(use_parallel_residual=True),
    "stablelm-qk": lambda: StableLm.build(qk_layernorm=True),
    "olmo2": Olmo2.build,
}
WINDOWS = ("mistral", "qwen2")
PRE = ("gptj", "opt", "phi3", "stablelm", "stablelm-parallel", "stablelm-qk", *WINDOWS)
"""Those whose norms stand before attention and feed-forward network."""
SANDWICH = "norm_placement 'sandwich' has|norm_placement is 'sandwich'"
POST_NORM = "norm_placement is 'post'"
REORDERED = "norm_placement is 'reordered'"
REFUSED = {"opt-post": POST_NORM, "gemma2": SANDWICH, "gemma3": SANDWICH, "olmo2": REORDERED}
NOT_STOCK = {
    "gptj": "lm_head_bias = True has no counterpart in GPT-NeoX",
    "opt": "positions_skip_padding = True has no counterpart in GPT-2",
    "opt-post": "final_norm = 'none' has no counterpart in GPT-2",
    "phi3": "partial_rotary_factor",
    **dict.fromkeys(
        ("stablelm", "stablelm-parallel", "stablelm-qk"), "final_norm_is_centered = True has no counterpart in Llama"
    ),
}
"""What the stock model of the same kind has no counterpart for, once the norms are gone."""
STOCK = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    **dict.fromkeys(WINDOWS, "Qwen3ForCausalLM"),
    "olmo2": "LlamaForCausalLM",
}
"""The stock class of the others."""
NOT_SPARSE = {
    **dict.fromkeys(("gemma2", "gemma3"), "attention_scale is not defined for attention 'spark'"),
    **dict.fromkeys(WINDOWS, "sliding_window is not defined for attention 'spark'"),
    **dict.fromkeys(("stablelm", "stablelm-parallel", "stablelm-qk"), "leaves a part without a pair of the 2 rotary"),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, NormfreeForCausalLM]:
    theirs = MODELS[request.param]()
    theirs.set_attn_implementation("eager")
    return request.param, theirs, from_hf(theirs)


@torch.no_grad()
def test_entropy_is_that_of_the_eager_weights(pair: Any) -> None:
    _, theirs, ours = pair
    mask = padding_mask("right")
    weights = theirs(tokens(), attention_mask=mask, output_attentions=True).attentions
    expected = torch.stack([torch.special.entr(each.double()).sum(-1).transpose(0, 1) for each in weights])
    with EntropyProbe(ours) as probe:
        ours(tokens(), attention_mask=mask)
    assert not probe.unreadable
    expected = expected[:, :, mask.bool()].mean(-1).float()
    torch.testing.assert_close(probe.per_head(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_layers_are_skipped_and_dropped(pair: Any) -> None:
    _, theirs, ours = pair
    text = tokens()
    expected = record(theirs, text).logits_without([1])
    assert_same(record(ours, text).logits_without([1]), expected)
    assert_same(prune_layers(ours, [1])(text).logits, expected)


def test_norms_are_removed(pair: Any) -> None:
    """All of them, those of queries and keys too; what it folds to, and what stock models cannot hold."""
    name, _, ours = pair
    ours.double()  # a constant std is far from a token's own in these random models, and logits are in the hundreds
    qk_norms: QKNorms = "keep" if ours.config.qk_norm == "none" else "remove"
    schedule = automatic_schedule(3, 300, parts_to_remove(ours.config, qk_norms), qk_norms)
    removals = schedule.removals(ours.config)
    with torch.no_grad():
        midway = Midway(ours.train(), schedule)
    ours(tokens(), labels=tokens())
    ours.eval()
    for removal in removals:
        midway.apply(removal)
    midway.finish()
    folded = remove_norms(_reloaded(ours))
    assert not any("norm" in each for each in folded.state_dict())
    mask = padding_mask("left")
    with torch.no_grad():
        kept = mask.bool()
        expected = ours(tokens(), attention_mask=mask).logits[kept]
        assert_same(folded(tokens(), attention_mask=mask).logits[kept], expected)
    if name in NOT_STOCK:
        with pytest.raises(InputError, match=NOT_STOCK[name]):
            to_stock(_reloaded(ours))
        return
    stock = to_stock(_reloaded(ours))
    assert type(stock).__name__ == STOCK[name]
    with torch.no_grad():
        expected = ours(tokens()).logits
        error = (stock(tokens()).logits - expected).abs().max()
        rounding = (ours.float()(tokens()).logits - expected).abs().max()
    assert error < 2 * rounding, "stock norms compute in float32"


@torch.no_grad()
def test_logits_are_attributed_or_refused(pair: Any) -> None:
    name, theirs, ours = pair
    text = tokens()
    prompts = PromptPairs(text[:2], text[1:], text[:2, 0], text[1:, 0])
    if name not in PRE:
        for read in (lambda: direct_logit_attribution(ours, text, text), lambda: patch_heads(ours, prompts)):
            with pytest.raises(InputError, match=REFUSED[name]):
                read()
        return
    found = direct_logit_attribution(ours, text, text)
    expected = theirs(text).logits.gather(-1, text[..., None])[..., 0]
    torch.testing.assert_close(found.contributions.sum(0) + found.constant, expected, rtol=0, atol=2e-5)
    last = theirs(text[:2]).logits[:, -1].double()
    difference = last.gather(1, text[:2, :1])[:, 0] - last.gather(1, text[1:, :1])[:, 0]
    assert_same(logit_difference(ours, prompts), difference)
    assert patch_heads(ours, prompts)["activation_patching"].notna().all()


def test_sparse_layers_are_made_or_refused(pair: Any) -> None:
    name, _, ours = pair
    with torch.no_grad():
        sparse = to_spark(ours, attention=False)
        expected = sparse(tokens()[:, :2]).logits
        assert expected.isfinite().all()
        with sparse_decode(sparse):
            torch.testing.assert_close(sparse(tokens()[:, :2]).logits, expected, rtol=1e-4, atol=1e-4)
    if name not in NOT_SPARSE:
        sparse = to_spark(ours)
        assert sparse.config.attention == "spark"
        with torch.no_grad():
            assert sparse(tokens()).logits.isfinite().all()
        return
    with pytest.raises(InputError, match=NOT_SPARSE[name]):
        to_spark(ours)


@pytest.mark.parametrize("n_beam", [1, 2])
def test_generation_with_a_static_cache(pair: Any, n_beam: int) -> None:
    _, theirs, ours = pair
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "num_beams": n_beam,
    }
    options |= {"attention_mask": padding_mask("left"), "cache_implementation": "static"}
    assert torch.equal(ours.generate(tokens(), **options), theirs.generate(tokens(), **options))


def _with(model: NormfreeForCausalLM, norms: dict[str, Any]) -> Any:
    config = type(model.config)
    return config(**{name: getattr(model.config, name) for name in config.option_names()} | norms)


def _reloaded(model: NormfreeForCausalLM) -> NormfreeForCausalLM:
    """What a checkpoint of the finished removal holds."""
    again: Any = NormfreeForCausalLM(_with(model, {}))
    again.to(model.dtype)
    again.load_state_dict(model.state_dict())
    reloaded: NormfreeForCausalLM = again.eval()
    return reloaded


def test_depth_is_measured(pair: Any) -> None:
    _, theirs, ours = pair
    expected, found = (measure_depth(model, tokens(), n_probe=2).frames() for model in (theirs, ours))
    for name, frame in found.items():
        numbers = frame.select_dtypes("number")
        pd.testing.assert_frame_equal(numbers, expected[name][numbers.columns], check_dtype=False, rtol=1e-2, atol=1e-3)


def test_int8_costs_little(pair: Any) -> None:
    _, _, ours = pair
    assert quantization_cost(ours, tokens())["eval_loss"].notna().all()


def test_a_step_of_training_moves_every_weight_that_it_reaches(pair: Any) -> None:
    """With gradient checkpointing too, and the same gradients."""
    _, _, ours = pair
    gradients = []
    for checkpointed in (False, True):
        model = deepcopy(ours).train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
