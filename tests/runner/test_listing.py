"""``normfree study --list``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from normfree.runner import installed_studies, list_studies, load_preset, preset_names

Normfree = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def studies() -> list[dict[str, Any]]:
    return list_studies()


def test_every_study_is_listed_with_what_it_asks(normfree: Normfree, studies: list[dict[str, Any]]) -> None:
    code, out, error = normfree("study", "--list", "--json")
    assert code == 0, error
    listed = json.loads(out)
    assert listed["studies"] == studies
    assert [each["study"] for each in listed["studies"]] == list(installed_studies())
    assert all(each["asks"] and each["runs"] for each in listed["studies"])
    assert listed["presets"] == {name: load_preset(name).description for name in preset_names()}


def test_the_runs_are_those_of_the_guide(studies: list[dict[str, Any]]) -> None:
    runs = {each["study"]: each["runs"] for each in studies}
    assert all(any(preset.endswith(("smoke", "cpu")) for preset in each) for each in runs.values())
    cpu = {
        name: runs[name]["cpu"] for name in ("relu-revival", "table-2", "learnable-slopes", "distillation", "scaling")
    }
    assert cpu == {"relu-revival": 4, "table-2": 12, "learnable-slopes": 20, "distillation": 7, "scaling": 36}
    assert runs["hybrid-activations"]["cpu"] == 2 + 2 * (load_preset("cpu").n_layer - 1)
    assert runs["curse-of-depth"]["depth-96"] == 14


def test_the_list_can_be_read(
    normfree: Normfree, studies: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normfree.runner.list_studies", lambda: studies)
    code, out, error = normfree("study", "--list")
    assert code == 0, error
    assert "relu-revival: GELU or ReLU, with or without LayerNorm?\n    runs a seed: smoke 4, cpu 4," in out
    assert "cpu: The study of the paper on two CPU cores in under ten minutes" in out
    assert max(map(len, out.splitlines())) < 160


def test_without_a_name_the_list_is_named(normfree: Normfree) -> None:
    code, _, error = normfree("study")
    assert (code, error) == (2, "normfree: name a study; normfree study --list shows them all\n")
