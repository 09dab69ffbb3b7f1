"""Low-rank changes of frozen weights: the merged model against the formula, what trains, checkpoints, and bad input."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.training import RunConfig, RunResult, load_pretrained, train
from normfree.training.lora import ADAPTERS_FILE, Adapters, LoraOptions
from normfree.training.run_folder import last_checkpoint
from tests.stop_at import StopAt

pytest.importorskip("peft")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model(**options: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    config = NormfreeConfig(vocab_size=43, n_positions=24, n_layer=2, n_head=4, n_embd=16, ffn="gated", **options)
    return NormfreeForCausalLM(config).eval()


def with_random_changes(changed: NormfreeForCausalLM, options: LoraOptions) -> Adapters:
    """B begins at zero, where a merged model would be the original."""
    adapters = Adapters(changed, options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in changed.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return adapters


@pytest.mark.parametrize(("options", "scale"), [(LoraOptions(rank=3), 2.0), (LoraOptions(rank=4, alpha=6), 1.5)])
def test_merged_weights_are_w_plus_scaled_b_a_in_float64(options: LoraOptions, scale: float) -> None:
    original = model().double()
    changed = copy.deepcopy(original)
    adapters = with_random_changes(changed, options)
    parts = {name: parameter.detach().numpy() for name, parameter in changed.named_parameters()}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        through_peft = changed(ids).logits
    plain = adapters.plain_state()
    assert plain.keys() == original.state_dict().keys()
    n_changed = 0
    for name, weight in original.state_dict().items():
        expected = weight.numpy()
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in parts:
            A, B = (parts[f"{stem}.lora_{each}.default.weight"] for each in "AB")
            assert A.shape[0] == B.shape[1] == options.rank
            expected = expected + scale * np.einsum("or,ri->oi", B, A)
            n_changed += 1
        np.testing.assert_allclose(plain[name].numpy(), expected, rtol=1e-13, atol=1e-13)
    assert n_changed == 2 * len(PROJECTIONS)

    adapters.merge()
    assert changed.state_dict().keys() == original.state_dict().keys()
    assert not any("lora" in type(module).__module__ for module in changed.modules())
    with torch.no_grad():
        torch.testing.assert_close(changed(ids).logits, through_peft, rtol=1e-10, atol=1e-10)


def test_the_adapters_and_the_norms_train_and_nothing_else() -> None:
    changed = model()
    n_before = sum(parameter.numel() for parameter in changed.parameters())
    Adapters(changed, LoraOptions(rank=2))
    trained = {name for name, parameter in changed.named_parameters() if parameter.requires_grad}
    norms = {name for name in trained if "lora" not in name}
    assert norms == {
        *(f"model.blocks.{n}.{norm}_norm.{what}" for n in (0, 1) for norm in ("attention", "ffn") for what in KINDS),
        *(f"model.final_norm.{what}" for what in KINDS),
    }
    n_inner, d = changed.config.n_inner, 16
    shapes = [(d, d)] * 4 + [(d, n_inner)] * 2 + [(n_inner, d)]
    n_lora = sum(p.numel() for name, p in changed.named_parameters() if "lora" in name)
    assert n_lora == 2 * sum(2 * (n_in + n_out) for n_in, n_out in shapes)
    assert sum(parameter.numel() for parameter in changed.parameters()) == n_before + n_lora


KINDS = ("weight", "bias")


def test_half_precision_weights_have_changes_in_float32_and_are_rounded_once() -> None:
    changed: Any = model()
    changed.to(torch.bfloat16)
    adapters = with_random_changes(changed, LoraOptions(rank=2))
    parts = dict(changed.named_parameters())
    stem = "model.blocks.0.ffn.up_proj"
    A, B = (parts[f"{stem}.lora_{each}.default.weight"] for each in "AB")
    assert (A.dtype, B.dtype) == (torch.float32, torch.float32)
    W = parts[f"{stem}.base_layer.weight"]
    expected = (W.double() + 2 * B.double() @ A.double()).detach()
    merged = adapters.plain_state()[f"{stem}.weight"]
    assert merged.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's eight bits.
    torch.testing.assert_close(merged.double(), expected, rtol=2**-8, atol=1e-7)


@pytest.fixture
def run(plain_run: RunResult, tiny_run: Callable[..., RunConfig]) -> RunConfig:
    return tiny_run().model_copy(
        update={"model": {}, "start_from": str(plain_run.folder), "lora": LoraOptions(rank=2), "configuration": "lora"}
    )


def test_a_run_leaves_plain_models_and_goes_on_identically(run: RunConfig, data: PackedData, tmp_path: Path) -> None:
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "parts", callbacks=(StopAt(5),))
    midway = load_pretrained(str(tmp_path / "parts")).model
    assert type(midway) is NormfreeForCausalLM
    train(run, data, tmp_path / "parts")
    start, end, again = (
        load_pretrained(str(each)).model.state_dict()
        for each in (run.start_from, tmp_path / "whole", tmp_path / "parts")
    )
    assert start.keys() == end.keys() == again.keys()
    for name, weight in end.items():
        assert torch.equal(weight, again[name]), name
        is_trained = "_norm." in name or any(each + ".weight" in name for each in PROJECTIONS)
        assert torch.equal(weight, start[name]) != is_trained, name
        if name.endswith("_proj.weight"):
            rank = torch.linalg.matrix_rank((weight - start[name]).double(), rtol=1e-4)
            assert rank <= 2, name
    n_plain = sum(parameter.numel() for parameter in midway.parameters())
    assert whole.row["n_parameters"] == n_plain, "the model that is measured has no adapters"
    newest = last_checkpoint(tmp_path / "whole")
    assert newest is not None
    kept = load_file(newest / ADAPTERS_FILE)
    assert all("lora" in name or "_norm." in name for name in kept), "the frozen weights are not kept twice"


def test_adapters_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    adapters = with_random_changes(model(), LoraOptions(rank=2))
    with pytest.raises(InputError, match=r"has no adapters\.safetensors"):
        adapters.load(tmp_path)
    adapters.save(tmp_path)
    again = Adapters(model(), LoraOptions(rank=2))
    again.load(tmp_path)
    for name, weight in adapters.plain_state().items():
        assert torch.equal(weight, again.plain_state()[name]), name
    with pytest.raises(InputError, match="adapters of another model"):
        Adapters(model(attention_bias="none", norm="rmsnorm", final_norm="rmsnorm"), LoraOptions(rank=2)).load(tmp_path)


def test_bad_input(run: RunConfig, data: PackedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        LoraOptions(rank=0)
    with pytest.raises(ValidationError, match="give start_from, or leave lora out"):
        RunConfig.model_validate({**run.model_dump(), "start_from": None})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"LoRA needs peft .*pip install 'normfree\[lora\]'"):
        train(run, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
