"""Schedules against the configurations of the released models, and what a schedule must not say.

``published_schedules.csv`` holds the published configurations (arXiv 2507.02559 and its public code).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from normfree import NormfreeConfig
from normfree.errors import InputError
from normfree.removal.parts import Part
from normfree.removal.plan import PUBLISHED_BATCH, PUBLISHED_LENGTH, RECIPE
from normfree.removal.schedule import (
    PUBLISHED_PARTS,
    SCHEDULES,
    Removal,
    RemovalSchedule,
    Stage,
    automatic_schedule,
    load_schedule,
    pretrained_schedule,
)
from normfree.training.recipe import Recipe

PUBLISHED = pd.read_csv(Path(__file__).parent / "published_schedules.csv").set_index("model")


def config(n_layer: int = 2, **options: Any) -> NormfreeConfig:
    return NormfreeConfig(n_layer=n_layer, n_embd=8, n_head=1, **{"eos_token_id": 0, **options})


def test_gpt2_small_goes_at_the_published_steps() -> None:
    expected = [Removal(20 + 2 * layer, "ffn", layer) for layer in range(12)]
    expected += [Removal(44 + 2 * layer, "attention_qk", layer) for layer in range(12)]
    expected += [Removal(68 + 3 * layer, "attention_v", layer) for layer in range(12)]
    expected += [Removal(104, "final", None), Removal(106, "end_of_text", None), Removal(116, "first_token", None)]
    assert load_schedule("gpt2").removals(config(12)) == expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_field_of_a_published_schedule(name: str) -> None:
    published: Any = PUBLISHED.loc[name]
    n_layer = int(published["n_layer"])
    schedule = load_schedule(name)
    steps: dict[str, list[int]] = {}
    for step, part, _ in schedule.removals(config(n_layer)):
        steps.setdefault(part, []).append(step)
    for part, column in (("ffn", "ffn"), ("attention_qk", "qk"), ("attention_v", "v")):
        first = published[f"first_{column}_step"]
        assert steps[part] == [first + published[f"{column}_gap"] * layer for layer in range(n_layer)]
    for part, column in (("final", "final_norm"), ("end_of_text", "end_of_text"), ("first_token", "first_token")):
        assert steps[part] == [published[f"{column}_step"]]
    assert schedule.std_loss_weight == published["auxiliary_loss_weight"]
    assert schedule.std_momentum == published["std_momentum"]
    assert schedule.special_tokens == "published"

    recipe = Recipe.model_validate(RECIPE | PUBLISHED_BATCH | schedule.recipe.model_dump(exclude_none=True))
    T = PUBLISHED_LENGTH
    recipe.check(T)
    assert published["sequence_length"] == T
    assert recipe.batch_size * T == published["tokens_per_step_nominal"]
    assert recipe.n_steps(T) == published["step_released"] > steps["first_token"][0]
    assert recipe.n_decay_steps(T) == published["steps_configured"]
    assert recipe.n_warmup_steps(T) == published["warmup_steps"]
    assert recipe.learning_rate_decay == "cosine"
    assert recipe.learning_rate == published["learning_rate"]
    final = recipe.learning_rate * recipe.final_learning_rate_ratio
    assert final == pytest.approx(published["learning_rate_final"], rel=1e-8)
    assert recipe.weight_decay == published["weight_decay"]


@pytest.mark.parametrize("n_layer", [1, 6, 12, 48])
@pytest.mark.parametrize("n_step", [30, 300, 5000])
def test_automatic_schedules_have_the_shares_of_gpt2_small(n_layer: int, n_step: int) -> None:
    removals = automatic_schedule(n_layer, n_step).removals(config(n_layer))
    steps = [each.step for each in removals]
    assert steps == sorted(steps)
    assert steps[0] >= 1
    assert abs(steps[-1] - max(116 * n_step / 300, 1)) <= 1
    if (n_layer, n_step) == (12, 300):
        assert removals == load_schedule("gpt2").removals(config(12))


def test_models_without_some_of_the_parts() -> None:
    automatic = automatic_schedule(2, 300).removals(config(eos_token_id=None))
    assert [each.part for each in automatic[-3:]] == ["final", "end_of_text", "first_token"]
    only_final = RemovalSchedule(stages=(Stage(part="final", after=3), Stage(part="first_token", after=2)))
    removals = only_final.removals(config(norm="none", eos_token_id=None))
    assert removals == [Removal(3, "final", None), Removal(5, "first_token", None)]


def test_stretched_waits_longer_behind_a_step_only() -> None:
    schedule = load_schedule("gpt2")
    before = schedule.removals(config(12))
    after = schedule.stretched(config(12), 30, 3.0).removals(config(12))
    assert [each for each in after if each.step <= 30] == [each for each in before if each.step <= 30]
    assert [each[1:] for each in after] == [each[1:] for each in before]
    assert after[-1].step == 30 + 3 * (before[-1].step - 30)


def stages(**changes: Any) -> list[dict[str, Any]]:
    parts = [*PUBLISHED_PARTS, "end_of_text", "first_token"]
    return [{"part": part, "after": 2, **changes.get(part, {})} for part in parts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": [*stages(), {"part": "final", "after": 1}]}, "removes final twice"),
        ({"stages": [*stages(), {"part": "ffn", "after": 1, "layers": [1]}]}, "removes ffn of layer 1 twice"),
        ({"stages": stages(ffn={"layers": [1]})}, "never removes ffn of layer 0; add a stage"),
        ({"stages": stages(ffn={"layers": [0, 1, 2]})}, "removes ffn of layer 2, which the model has not"),
        ({"stages": stages()[:-1]}, "never removes first_token"),
    ],
)
def test_a_schedule_removes_each_norm_once(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RemovalSchedule.model_validate(content).removals(config())


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("stages:\n- {part: ffn, after: 2, gap: -1}\n")
    with pytest.raises(InputError, match=r"schedule.yaml: stages.0.gap: .*greater than or equal to 0 \(given: -1\)"):
        load_schedule(str(path))
    path.write_text("stages: []\nmomentum: 1\n")
    with pytest.raises(InputError, match=r"unknown option 'momentum' \(did you mean 'std_momentum'\?\)"):
        load_schedule(str(path))
    with pytest.raises(InputError, match=r"unknown removal schedule 'gpt2-smal'.*allowed: gpt2, gpt2-medium"):
        load_schedule("gpt2-smal")


def test_the_schedule_of_pretrained_models_is_slow_with_what_costs_most() -> None:
    parts: tuple[Part, ...] = ("ffn", "attention_qk", "attention_v", "final")
    schedule = pretrained_schedule(30, 700, parts)
    config = NormfreeConfig(n_layer=30, n_head=1, n_embd=8, eos_token_id=None)
    steps = [each.step for each in schedule.removals(config)]
    assert len(steps) == 92
    assert 58 <= steps[0] <= 70
    gaps = np.diff(steps[:-1])
    assert min(gaps[:29]) >= 5
    assert max(gaps[30:]) <= 3
    assert schedule.last_step(config) == steps[-1] + 175 - 1
    assert 0.85 * 700 < schedule.last_step(config) < 0.9 * 700


@pytest.mark.parametrize("n_layer", [1, 2, 6, 48])
@pytest.mark.parametrize("parts", [("ffn",), ("ffn", "attention_qk", "attention_v", "final"), ("final",)])
def test_it_fits_every_model_and_budget(n_layer: int, parts: tuple[Part, ...]) -> None:
    for n_step in (16, 300, 5000):
        schedule = pretrained_schedule(n_layer, n_step, parts)
        total = schedule.massive_steps + sum(
            stage.after + stage.gap * (n_layer - 1 if stage.gap else 0) for stage in schedule.stages
        )
        assert total + schedule.ramp_of("massive_tokens") < n_step
        assert schedule.stages[0].after >= 1
