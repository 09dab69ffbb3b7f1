"""Norms in every placement, and of queries and keys, on their way out: against float64 NumPy, and folded away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree import NormfreeConfig, NormfreeForCausalLM, remove_norms
from normfree.errors import InputError
from normfree.modeling.blocks import PLACEMENTS
from normfree.modeling.norms import SCALED_NORMS
from normfree.removal.midway import Midway
from normfree.removal.parts import SPECIAL_PARTS, QKNorms, norms_to_remove, parts_to_remove
from normfree.removal.schedule import Removal, RemovalSchedule, automatic_schedule
from normfree.removal.std_losses import STD_LOSS, StdLosses

from ..modeling import reference
from .models import VOCAB, perturbed, tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 16,
}
LLAMA = {"ffn": "gated", "tie_word_embeddings": False}
KINDS = {
    "layernorm": {"attention_bias": "all", "mlp_bias": True},
    "rmsnorm": {"attention_bias": "none", "mlp_bias": False},
}
FLOAT32 = torch.finfo(torch.float32).eps
QK = ("layernorm", "rmsnorm", "rmsnorm_full_width", "layernorm_per_head")


def model_of(kind: str, **options: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    config = NormfreeConfig(**{**SIZES, **LLAMA, **KINDS[kind], "norm": kind, "final_norm": kind, **options})
    return perturbed(NormfreeForCausalLM(config)).double()


def schedule_of(model: NormfreeForCausalLM, qk_norms: QKNorms = "keep", **options: Any) -> RemovalSchedule:
    config = model.config
    schedule = automatic_schedule(config.n_layer, 300, parts_to_remove(config, qk_norms), qk_norms)
    return schedule.model_copy(update={"std_momentum": 0.5, **options})


def constant(model: NormfreeForCausalLM, folder: Path, qk_norms: QKNorms = "keep") -> NormfreeForCausalLM:
    """``model``, changed in place, after two batches and the removal of every part, and as its checkpoint loads."""
    schedule = schedule_of(model, qk_norms)
    removals = schedule.removals(model.config)
    midway = Midway(model, schedule)
    for _ in range(2):
        model.train()(tokens())
    model.eval()
    for removal in removals:
        midway.apply(removal)
    midway.finish()
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert isinstance(loaded, NormfreeForCausalLM)
    return loaded


def logits(model: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    with torch.no_grad():
        return model.to(dtype)(tokens()).logits


def check(model: NormfreeForCausalLM, folder: Path, qk_norms: QKNorms = "keep") -> NormfreeForCausalLM:
    """The folded model; the constant-std one agrees with NumPy, and the folded one with it."""
    before = logits(model)
    tolerance = 1e-5 if model.config.position == "rotary" else 1e-8  # transformers computes rotary angles in float32
    expected = reference.logits(model.config, reference.weights_of(model), tokens()[0].numpy())
    np.testing.assert_allclose(before[0], expected, rtol=tolerance, atol=tolerance)
    settled = constant(model, folder, qk_norms)
    assert not torch.allclose(logits(settled), before)
    expected = reference.logits(settled.config, reference.weights_of(settled), tokens()[0].numpy())
    np.testing.assert_allclose(logits(settled)[0], expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits(model), logits(settled), rtol=1e-9, atol=1e-9)
    folded = remove_norms(settled)
    torch.testing.assert_close(logits(folded), logits(settled), rtol=1e-8, atol=1e-8)
    single = dict(remove_norms(settled.float()).named_parameters())
    for name, exact in folded.named_parameters():
        atol = FLOAT32 * exact.abs().max().item()
        torch.testing.assert_close(single[name].double(), exact, rtol=0, atol=atol, msg=f"{name} is not rounded once")
    return folded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement(placement: str, kind: str, tmp_path: Path) -> None:
    model = model_of(kind, norm_placement=placement)
    if placement.startswith("hybrid") and kind == "layernorm":
        with pytest.raises(InputError, match=f"norm_placement '{placement}' subtracts the mean of the residual stream"):
            Midway(model, schedule_of(model))
        return
    folded = check(model, tmp_path)
    assert not any("_norm" in name for name in folded.state_dict())
    assert folded.config.norm_placement == "pre"


@pytest.mark.parametrize("placement", ["pre", "sandwich", "reordered"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qk_norm", QK)
def test_qk_norms_go_with_a_constant_per_head(qk_norm: str, kind: str, placement: str, tmp_path: Path) -> None:
    folded = check(model_of(kind, norm_placement=placement, qk_norm=qk_norm, position="rotary"), tmp_path, "remove")
    assert not any("_norm" in name for name in folded.state_dict())
    assert folded.config.qk_norm == "none"


@pytest.mark.parametrize("qk_norm", QK)
def test_qk_norms_stay(qk_norm: str, tmp_path: Path) -> None:
    folded = check(model_of("rmsnorm", norm_placement="sandwich", qk_norm=qk_norm), tmp_path)
    assert folded.config.qk_norm == qk_norm
    assert {name.split(".")[-2] for name in folded.state_dict() if "_norm" in name} == {"q_norm", "k_norm"}


@pytest.mark.parametrize("norm", SCALED_NORMS)
def test_layernorm_scaling_goes_into_the_gain(norm: str, tmp_path: Path) -> None:
    kind = norm.removesuffix("_scaling")
    check(model_of(kind, norm=norm), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm", "final_norm": "rmsnorm"},
        {"norm": "rmsnorm", "final_norm": "layernorm"},
        {"norm": "rmsnorm", "final_norm": "none"},
        {"norm": "none", "final_norm": "rmsnorm"},
        {"norm": "rmsnorm", "final_norm": "rmsnorm", "norm_placement": "post", "tie_word_embeddings": True},
        {"norm": "layernorm", "final_norm": "none", "norm_placement": "post", "tie_word_embeddings": True},
    ],
)
def test_norms_of_different_kinds(options: dict[str, Any], tmp_path: Path) -> None:
    check(model_of("rmsnorm", **options), tmp_path)


def test_a_model_whose_only_norms_are_of_queries_and_keys(tmp_path: Path) -> None:
    model = model_of("rmsnorm", norm="none", final_norm="none", qk_norm="rmsnorm")
    with pytest.raises(InputError, match=r"no norm to remove.*its qk_norm 'rmsnorm' goes with qk_norms: remove"):
        Midway(model, automatic_schedule(2, 300))
    assert [part for part, _ in norms_to_remove(model.config, "remove")] == ["qk_norm", "qk_norm"]
    check(model, tmp_path, "remove")


def test_every_head_has_the_mean_of_its_own_stds(tmp_path: Path) -> None:
    """One batch, so that the running mean is that of its tokens; the first of each sequence is left out."""
    model = model_of("rmsnorm", qk_norm="rmsnorm")
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.blocks[1].attention
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.detach()}))
    midway = Midway(model, schedule_of(model, "remove"))
    model.train()(tokens())
    for name in "qk":
        heads = seen[f"{name}_proj"].unflatten(-1, (-1, model.config.head_dim)).numpy()
        stds = np.sqrt((heads**2).mean(-1) + model.config.norm_eps)
        found = getattr(attention, f"{name}_norm").std
        assert found.shape == (1, {"q": 4, "k": 2}[name])
        np.testing.assert_allclose(found[0], stds[:, 1:].mean((0, 1)), rtol=1e-5)
    assert midway.tokens.shares["first_token"] == 1


@pytest.mark.parametrize("treatment", ["separate", "measured"])
def test_the_losses_of_heads_are_their_own(treatment: str) -> None:
    """Each head is drawn to the mean of its ordinary tokens, then to its constant; massive tokens are of the stream."""
    model = model_of("rmsnorm", norm_placement="sandwich", qk_norm="layernorm_per_head")
    options = {"std_loss": "log_ratio", "std_loss_norms": "all", "std_loss_weight": 1.0, "massive_weight": 0.5}
    options |= {"special_tokens": treatment, "special_factor": 1.5}
    removals = [each for each in schedule_of(model, "remove").removals(model.config) if each.part not in SPECIAL_PARTS]
    midway = Midway(model, schedule_of(model, "remove", **options))
    objective = StdLosses(midway)
    inputs: dict[str, torch.Tensor] = {}
    for name, norm in midway.norms():
        norm.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].detach()}))
    model.train()(tokens())

    def mismatch(*, constant: bool) -> float:
        found = []
        for name, norm in midway.norms():
            x = inputs[name].numpy()
            x = x - x.mean(-1, keepdims=True) if "attention.q" in name or "attention.k" in name else x
            stds = np.sqrt((x**2).mean(-1) + norm.eps).reshape(*x.shape[:2], -1)
            ordinary = np.ones_like(stds, dtype=bool)
            ordinary[:, 0] = False
            if treatment == "measured":
                ordinary = stds <= 1.5 * np.median(stds, axis=1, keepdims=True)
            means = [stds[..., head][ordinary[..., head]].mean() for head in range(stds.shape[-1])]
            if constant:
                np.testing.assert_allclose(norm.std[0].flatten(), means, rtol=1e-5)
            found.append((np.log(stds / np.array(means)) ** 2).mean())
        return float(np.mean(found))

    terms = objective.terms(None, None)
    np.testing.assert_allclose(terms[STD_LOSS].value.item(), mismatch(constant=False), rtol=1e-9)
    assert len(objective.all_norms) == len(list(midway.norms())) - 4, "without two norms of heads a block"
    for removal in removals:
        midway.apply(removal)
    again = objective.terms(None, None)[STD_LOSS].value.item()
    np.testing.assert_allclose(again, mismatch(constant=True), rtol=1e-5)


def test_one_part_of_heads_is_measured_alone() -> None:
    model = model_of("rmsnorm", qk_norm="rmsnorm")
    midway = Midway(model, schedule_of(model, "remove"))
    model.train()(tokens())  # sets the running stds
    model.eval()
    with torch.no_grad():
        before = model(tokens()).logits
        with midway.alone(Removal(0, "qk_norm", 1)) as std:
            assert not torch.allclose(model(tokens()).logits, before)
        heads = [model.model.blocks[1].attention.get_submodule(f"{name}_norm").std for name in "qk"]
        assert std == pytest.approx(float(torch.cat(heads, dim=1).mean()))
        torch.testing.assert_close(model(tokens()).logits, before)


def test_means_that_no_weight_can_subtract_are_refused(tmp_path: Path) -> None:
    mixed = model_of("layernorm", norm_placement="mix", final_norm="rmsnorm")
    with pytest.raises(InputError, match="norm_placement 'mix' subtracts the mean of the residual stream"):
        Midway(mixed, schedule_of(mixed))
    for options in ({"norm_placement": "hybrid"}, {"norm_placement": "mix", "final_norm_is_centered": False}):
        config = NormfreeConfig(**{**SIZES, **LLAMA, "norm": "constant_std", "final_norm": "constant_std", **options})
        with pytest.raises(InputError, match=r"a LayerNorm on the residual stream subtracts.*RMSNorm can be folded"):
            remove_norms(NormfreeForCausalLM(config))


def test_means_that_float32_weights_cannot_subtract_are_refused(tmp_path: Path) -> None:
    """Gains that differ by orders of magnitude make the folded stream one that rounds away what is written."""
    settled = constant(model_of("layernorm", norm_placement="post", n_layer=6), tmp_path)
    remove_norms(settled)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in settled.model.blocks:
            for norm in (block.attention_norm, block.ffn_norm):
                norm.weight.copy_((2 * torch.randn(norm.weight.shape, generator=generator)).exp())
    with pytest.raises(InputError, match="differ too much to be undone in float32"):
        remove_norms(settled)


def test_gains_of_zero_on_the_stream_are_refused(tmp_path: Path) -> None:
    settled = constant(model_of("rmsnorm", norm_placement="post"), tmp_path)
    with torch.no_grad():
        settled.model.blocks[0].ffn_norm.weight[3] = 0.0
    with pytest.raises(InputError, match="a gain of a norm on the residual stream is 0"):
        remove_norms(settled)
