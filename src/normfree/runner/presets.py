"""Presets: the size of a study (model, data, recipe), as YAML shipped with the package or written by the user."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from normfree.data import DataConfig
from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.modeling import NormfreeConfig
from normfree.training import Recipe
from normfree.training.configuration import read_yaml, with_changes

_FOLDER = files("normfree") / "presets"


class PublishedColumn(BaseModel):
    """Which column of the published tables stands beside our results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    context_length: int


class RemovalOptions(BaseModel):
    """At which budgets and learning rates the studies of norm removal fine-tune.

    budget_shares: of the tokens that a model was trained on.
    learning_rates: each variant is reported at the best of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_shares: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.02, 0.05), min_length=1)
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-4, 3e-4, 1e-3), min_length=1)

    @field_validator("*")
    @classmethod
    def _check_different(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("they must be different")
        return values


class Preset(BaseModel):
    """What all configurations of a study share: the model's sizes, the data, the recipe and the seeds.

    ``columns`` names the presets (itself among them) whose results make the columns of the paper's Table 2 at this
    scale; a file of the user's own is named by its path, from the folder of the file that names it. ``removal`` is for
    the studies of norm removal alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    model_name: str
    published: PublishedColumn | None = None
    seeds: list[int] = Field(default=[0], min_length=1)
    columns: list[str] = []
    removal: RemovalOptions | None = None
    model: dict[str, Any]
    data: DataConfig
    recipe: Recipe

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different numbers from 0")
        return seeds

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        if model.get("sliding_window") is not None:
            raise ValueError(
                "sliding_window is not for studies: their figures draw the largest entropy of full causal attention"
            )
        return model

    @property
    def n_layer(self) -> int:
        """Layers of the model."""
        return int(self.model.get("n_layer", NormfreeConfig.n_layer))

    def with_changes(self, **changes: Any) -> Preset:
        """The preset with some values changed; names are dotted, ``recipe.tokens=...``.

        Raises:
            InputError: a name is unknown or a value is not allowed.
        """
        return _validated(with_changes(self.model_dump(exclude_unset=True), changes), "the changed preset")


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir() if path.name.endswith(".yaml"))


def load_preset(name: str) -> Preset:
    """A preset by name, or from a YAML file by path.

    Raises:
        InputError: there is no such preset or file, or its content is wrong.
    """
    if name in preset_names():
        path = Path(str(_FOLDER / f"{name}.yaml"))
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        raise unknown_name("preset", name, [*preset_names(), "PATH.yaml"])
    preset = _validated(read_yaml(path), str(path))
    for option in preset.model:
        if option not in NormfreeConfig.option_names():
            raise InputError(f"{path}: {unknown_name('model option', option, NormfreeConfig.option_names())}")
    return preset


def _validated(content: dict[str, Any], where: str) -> Preset:
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        raise invalid_fields(where, error, Preset) from error
