"""Presets: the size of a study (model, data, recipe), as YAML shipped with the package or written by the user.

A preset may name another one as its ``base`` and hold only what differs from it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from normfree.data import DataConfig
from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.modeling import NormfreeConfig
from normfree.training import Recipe
from normfree.training.run_config import model_fields, read_yaml, with_changes

_FOLDER = files("normfree") / "presets"


class PublishedColumn(BaseModel):
    """The column of the published tables to show next to the results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    context_length: int


class RemovalOptions(BaseModel):
    """Budgets and learning rates of the fine-tuning in the studies of norm removal.

    budget_shares: shares of the tokens that a model was trained on.
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

    caution: why its results prove nothing, if so; reports begin with it.
    columns: presets (itself among them) whose results make the columns of the paper's Table 2 at this scale; names, or
        paths relative to the preset's own file.
    removal: for the studies of norm removal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    caution: str | None = None
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
    """A preset by name, or from a YAML file by path; its values are those of its ``base``, changed by its own.

    The sections ``model``, ``data``, ``recipe``, ``published`` and ``removal`` are merged option by option, and null
    takes an option of the base away. A base is a preset's name, or a path relative to the file that names it.

    Raises:
        InputError: there is no such preset, file or base, bases form a circle, or the content is wrong.
    """
    path = _path(name, Path())
    content = _resolved(path, ())
    preset = _validated(content, str(path))
    for option in preset.model:
        if option not in NormfreeConfig.option_names():
            raise InputError(f"{path}: {unknown_name('model option', option, NormfreeConfig.option_names())}")
    return preset


def _path(name: str, folder: Path) -> Path:
    """The file of a preset that is named in a file of ``folder``."""
    if name in preset_names():
        return Path(str(_FOLDER / f"{name}.yaml"))
    if name.endswith((".yaml", ".yml")):
        return folder / name
    raise unknown_name("preset", name, [*preset_names(), "PATH.yaml"])


def _resolved(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file with that of its base; ``derived`` are the files whose base it is, outermost first."""
    content = read_yaml(path)
    name = content.pop("base", None)
    if name is None:
        return content
    try:
        base = _path(str(name), path.parent)
        if base.resolve() in (each.resolve() for each in (*derived, path)):
            raise InputError("bases form a circle")
        merged = _resolved(base, (*derived, path))
    except InputError as error:
        raise InputError(f"{path}: base {name}: {error}") from error
    changes: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            merged.setdefault(key, {})
            changes |= {f"{key}.{option}": each for option, each in value.items()}
        else:
            changes[str(key)] = value
    merged = with_changes(merged, changes)
    sections = [merged, *(each for each in merged.values() if isinstance(each, dict))]
    for section in sections:
        for option in [option for option, value in section.items() if value is None]:
            del section[option]
    return merged


def _validated(content: dict[str, Any], where: str) -> Preset:
    try:
        return Preset.model_validate(content)
    except ValidationError as error:
        raise invalid_fields(where, error, Preset, model_fields()) from error
