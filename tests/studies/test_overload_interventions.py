"""Changes of trained models: each changes what it names and nothing else, and every run is changed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.entropy import uniform_entropy_bound
from normfree.studies.overload_interventions import (
    CONTROL,
    INTERVENTIONS,
    SHARPER,
    STUDY,
    Trained,
    intervention_table,
    other_activation,
    sharper_heads,
    unit_inputs,
)

Command = Callable[..., tuple[int, str, str]]
T = 16
BOUND = uniform_entropy_bound(T)


def small_model(**changes: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    options: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": T, **changes}
    model = NormfreeForCausalLM(NormfreeConfig(**options, norm="none", activation="gelu", attention_bias="qk")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def trained() -> Trained:
    """Head 1 of layer 0 and head 0 of layer 2 are stuck."""
    entropy = np.full((3, 2), 0.2)
    entropy[0, 1] = entropy[2, 0] = 0.9 * BOUND
    return Trained(small_model(), entropy, torch.randint(40, (3, T)))


@torch.no_grad()
def logits(model: NormfreeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return found


def test_the_control_is_a_copy(trained: Trained) -> None:
    (control,) = [each for each in INTERVENTIONS if each.label == CONTROL]
    copy = control.change(trained)
    torch.testing.assert_close(logits(copy, trained.tokens), logits(trained.model, trained.tokens))
    with torch.no_grad():
        copy.model.embed_tokens.weight.zero_()
    assert trained.model.model.embed_tokens.weight.abs().sum() > 0


def test_activations_change_in_their_layers_alone(trained: Trained) -> None:
    changed = other_activation(trained, range(1, 3))
    assert changed.config.activations == ["gelu", "relu", "relu"]
    assert trained.model.config.activations == ["gelu"] * 3
    torch.testing.assert_close(changed.state_dict(), trained.model.state_dict())
    assert not torch.allclose(logits(changed, trained.tokens), logits(trained.model, trained.tokens))
    back = other_activation(Trained(changed, trained.entropy, trained.tokens), range(1, 3))
    torch.testing.assert_close(logits(back, trained.tokens), logits(trained.model, trained.tokens))


def test_logits_of_stuck_heads_alone_are_sharper(trained: Trained) -> None:
    changed = sharper_heads(trained)
    x = torch.randn(2, T, 16)
    for layer, (before, after) in enumerate(zip(trained.model.model.blocks, changed.model.blocks, strict=True)):
        factors = []
        for block in (before, after):
            query, key, _ = block.attention.project(x, None)
            factors.append(query @ key.transpose(-1, -2))
        expected = torch.tensor([SHARPER if each > 0.75 * BOUND else 1.0 for each in trained.entropy[layer]])
        torch.testing.assert_close(factors[1], factors[0] * expected[:, None, None])


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["dense", "gated", "spark"])
def test_inputs_have_an_rms_of_one_in_the_same_function(trained: Trained, ffn: str) -> None:
    trained = replace(trained, model=small_model(ffn=ffn))
    changed = unit_inputs(trained).eval()
    torch.testing.assert_close(logits(changed, trained.tokens), logits(trained.model, trained.tokens))
    read: list[torch.Tensor] = []
    for block in changed.model.blocks:
        block.attention_norm.register_forward_hook(lambda module, arguments, results: read.extend(results))
        block.ffn_norm.register_forward_hook(lambda module, arguments, result: read.append(result))
    logits(changed, trained.tokens)
    assert len(read) == 9, "queries and keys, values, and the feed-forward network of each layer"
    np.testing.assert_allclose([each.square().mean() for each in read], 1, rtol=1e-5)
    trained.model.model.blocks[0].ffn.up_proj.weight.zero_()
    assert changed.model.blocks[0].ffn.up_proj.weight.abs().sum() > 0


def test_excesses_are_against_the_control_of_the_same_seed() -> None:
    losses = pd.DataFrame(
        [(CONTROL, 0, 3.0, 2.0), (CONTROL, 1, 3.0, 2.5), ("a", 0, 9.0, 1.9), ("a", 1, 8.0, 2.2)],
        columns=["intervention", "seed", "before", "after"],
    )
    entropy = pd.DataFrame(
        [
            (name, seed, 0, head, value)
            for name in (CONTROL, "a")
            for seed in (0, 1)
            for head, value in ((0, 0.1), (1, 0.8))
        ],
        columns=["intervention", "seed", "layer", "head", "entropy_nats"],
    )
    control, changed = intervention_table(losses, entropy, bound=1.0).to_dict("records")
    assert (control["excess"].mean, changed["before"].mean) == (0, 8.5)
    assert changed["excess"].mean == pytest.approx(-0.2)
    assert control["stuck_percent"].mean == 50
    entropy.loc[0, "entropy_nats"] = np.nan
    assert np.isnan(intervention_table(losses, entropy, bound=1.0)["stuck_percent"][0].mean)


def test_every_run_without_norms_is_changed_once(
    normfree: Command, preset_content: dict[str, Any], tmp_path: Path
) -> None:
    recipe = {**preset_content["recipe"], "steps": 48, "eval_steps": 48, "save_steps": 48}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**preset_content, "recipe": recipe}))
    command = ("study", STUDY.name, "--preset", "tiny.yaml", "--out", "study")
    code, _, err = normfree(*command)
    assert code == 0, err
    study = tmp_path / "study"
    tables = {path.parents[1].name: pd.read_csv(path) for path in study.glob("runs/*/*/interventions.csv")}
    assert tables.keys() == {"sm-g", "sm-r"}
    for name, table in tables.items():
        assert table["intervention"].tolist() == [each.label for each in INTERVENTIONS]
        own = pd.read_csv(study / "runs" / name / "seed-0" / "results.csv")["eval_loss"].item()
        assert table["before"][0] == pytest.approx(own, abs=1e-5)
        tuned = pd.read_csv(study / "runs" / name / "seed-0" / "interventions" / "control" / "tuned" / "results.csv")
        assert (tuned["steps"].item(), tuned["learning_rate"].item()) == (3, pytest.approx(3e-4))
        assert table["after"][0] == pytest.approx(tuned["eval_loss"].item())
        assert table["after"][0] != table["before"][0]
    assert {path.name for path in (study / "figures").glob("*.png")} == {
        "entropy-after-sm-g.png",
        "entropy-after-sm-r.png",
    }
    assert "SM+G (control: " in (study / "report.html").read_text()
    assert not list(study.rglob("start"))
    times = {path: path.stat().st_mtime_ns for path in study.rglob("interventions.csv")}
    assert normfree(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
