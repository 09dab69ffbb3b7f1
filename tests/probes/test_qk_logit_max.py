"""The largest attention logit of each head: against the logits of transformers' own eager attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MptConfig, MptForCausalLM

import normfree
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.probes.optional import optional_probe, optional_probes
from normfree.probes.optional.qk_logit_max import QKLogitMaxProbe
from normfree.training import Recipe, RunConfig, train
from normfree.training.records import LAYERS_FILE

from .small_models import ARCHITECTURES, batch_of, build

GEMMA2: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "initializer_range": 0.5,
    "attn_logit_softcapping": 1.5,
}


def largest_by_softmax(monkeypatch, model, batch):
    """[n_layer, n_head] float64, of what an eager twin gives to its softmax; queries that are padding left out.

    In float32: in float64 transformers' masks of whole rows become NaN.
    """
    twin, seen = copy.deepcopy(model).eval(), []
    twin.set_attn_implementation("eager")
    softmax = torch.nn.functional.softmax

    def recorded(scores, *args, **kwargs):
        if scores.dim() == 4:
            is_query = batch["attention_mask"].bool()[:, None, :, None]
            seen.append(scores.masked_fill(~is_query, -math.inf).amax((0, 2, 3)).double().numpy())
        return softmax(scores, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", recorded)
        twin(**batch)
    return np.stack(seen)


def probed(model, *batches):
    with QKLogitMaxProbe(model) as probe, torch.no_grad():
        for batch in batches:
            model(**batch)
    return probe


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_stock_models(name, padding, monkeypatch):
    model, batch = build(name), batch_of(padding)
    expected = largest_by_softmax(monkeypatch, model, batch)
    assert expected.std() > 0.1
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        np.testing.assert_allclose(probed(model, batch).per_head(), expected, rtol=1e-5, atol=1e-5)


def test_soft_capped_logits_in_windows(monkeypatch):
    torch.manual_seed(0)
    model, batch = Gemma2ForCausalLM(Gemma2Config(**GEMMA2)).eval(), batch_of("none")
    model.set_attn_implementation("eager")
    found = probed(model, batch).per_head()
    np.testing.assert_allclose(found, largest_by_softmax(monkeypatch, model, batch), rtol=1e-5)
    assert (found < 1.5).all()


def test_a_model_with_a_softmax_of_its_own(monkeypatch):
    torch.manual_seed(0)
    model = MptForCausalLM(MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=2, initializer_range=0.5)).eval()
    batch = batch_of("right")
    np.testing.assert_allclose(
        probed(model, batch).per_head(), largest_by_softmax(monkeypatch, model, batch), rtol=1e-5
    )


@pytest.mark.parametrize("block_elements", [1, 200])
def test_blocks_and_batches_add_up(block_elements, monkeypatch):
    model = build("llama")
    batches = [batch_of("left", seed=1), batch_of("none", n_token=9, seed=2)]
    expected = np.maximum(*(largest_by_softmax(monkeypatch, model, each) for each in batches))
    monkeypatch.setattr("normfree.entropy.visibility.BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr("normfree.entropy.visibility.MIN_BLOCK_ROWS", 1)
    np.testing.assert_allclose(probed(model, *batches).per_head(), expected, rtol=1e-5)


def test_nan_is_not_passed_over():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8] = torch.nan
    found = probed(model, batch_of("none")).per_head()
    assert found.isnan().tolist() == [[False] * 4, [True] + [False] * 3]


def test_selected_keys_are_refused():
    config = normfree.NormfreeConfig(
        vocab_size=50, n_layer=2, n_head=2, n_embd=16, n_positions=16, attention="spark", attention_active=3
    )
    probe = probed(normfree.NormfreeForCausalLM(config), {"input_ids": torch.arange(16)[None]})
    assert len(probe.unreadable) == 2
    with pytest.raises(InputError, match="no attention layer of the model has been read: it attends to selected keys"):
        list(probe.layer_rows())


def test_every_process_has_the_maximum_of_all(monkeypatch):
    model = build("gpt2")
    mine, other = probed(model, batch_of("none", seed=1)), probed(model, batch_of("none", seed=2))
    both = probed(model, batch_of("none", seed=1), batch_of("none", seed=2))
    others = iter(list(other._seen.values()))

    def gather_objects(found, mine):
        found[:] = [mine, mine]

    def gather(everyones, mine):
        everyones[0].copy_(next(others))
        everyones[1].copy_(mine)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather_objects)
    monkeypatch.setattr("torch.distributed.all_gather", gather)
    mine.reduce()
    assert torch.equal(mine.per_head(), both.per_head())


def test_names_are_those_of_files_and_entry_points(monkeypatch):
    assert "qk_logit_max" in optional_probes()
    made = optional_probe("qk_logit_max", build("gpt2"))
    assert isinstance(made, QKLogitMaxProbe)
    with pytest.raises(InputError, match=r"unknown probe 'qk_logit' \(did you mean 'qk_logit_max'\?\); allowed: "):
        optional_probe("qk_logit", build("gpt2"))
    with pytest.raises(ValueError, match="unknown probe 'nothing'"):
        Recipe(steps=1, probes=("nothing",))


def test_a_run_records_the_probes_that_its_recipe_names(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    plain = train(tiny_run(batch_size=8), data, tmp_path / "plain")
    asked = train(tiny_run(batch_size=8, probes=["qk_logit_max"]), data, tmp_path / "asked")
    layers = pd.read_parquet(asked.folder / LAYERS_FILE)
    mine = layers["name"] == "qk_logit_max"
    pd.testing.assert_frame_equal(layers[~mine].reset_index(drop=True), pd.read_parquet(plain.folder / LAYERS_FILE))
    assert layers.loc[mine, ["step", "layer", "head"]].to_numpy().tolist() == [
        [step, layer, head] for step in (0, 2, 4) for layer in range(2) for head in range(2)
    ]
    assert np.isfinite(layers.loc[mine, "value"]).all()
    assert plain.row["eval_loss"] == asked.row["eval_loss"]
