"""Everything needed to run one training again, as a YAML file."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from normfree.data import DataConfig, PackedData
from normfree.devices import default_device
from normfree.errors import InputError, field_names, invalid_fields, unknown_name
from normfree.files import read_regular
from normfree.modeling import NormfreeConfig
from normfree.training.lora import LoraOptions
from normfree.training.objectives import OBJECTIVES, Objective, ObjectiveOptions
from normfree.training.recipe import Recipe, fitting_micro_batch_size
from normfree.training.run_folder import PROVENANCE, parsed_yaml


class RunConfig(BaseModel):
    """One training run: a named configuration of a named model, its data, its recipe and its seed.

    ``model`` holds options of :class:`~normfree.NormfreeConfig`. The vocabulary size and the token ids come from
    the tokenizer, ``n_positions`` from ``data.sequence_length``; none of them may stand in ``model``. Without an
    ``objective`` it is plain cross-entropy; its ``kind`` is one of ``OBJECTIVES``. With ``start_from``, what
    :func:`~normfree.training.load_pretrained` takes, the run starts from that model's weights and architecture, and
    ``model`` is empty; with ``lora`` too, most of those weights stay as they are and low-rank changes of them train.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_name: str
    configuration: str
    seed: int = Field(0, ge=0)
    model: dict[str, Any]
    data: DataConfig
    recipe: Recipe
    objective: SerializeAsAny[ObjectiveOptions] | None = None
    start_from: str | None = None
    lora: LoraOptions | None = None

    @model_validator(mode="after")
    def _check_start(self) -> RunConfig:
        if self.start_from is not None and self.model:
            raise ValueError(
                f"a run that starts from a model has its architecture: model must be empty, not {self.model}"
            )
        if self.start_from is None and self.lora is not None:
            raise ValueError("lora changes the weights of a model that there is: give start_from, or leave lora out")
        return self

    @field_validator("objective", mode="before")
    @classmethod
    def _read_objective(cls, options: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        kind = options.get("kind")
        if kind not in OBJECTIVES:
            raise unknown_name("kind of objective", kind, OBJECTIVES)
        try:
            return OBJECTIVES[kind].model_validate(options)
        except ValidationError as error:
            raise invalid_fields(kind, error, OBJECTIVES[kind]) from error

    def build_objective(self, model: NormfreeConfig, folder: Path) -> Objective | None:
        """The objective for that model, trained in ``folder``; None for plain cross-entropy.

        Raises:
            InputError: it does not fit the model, the recipe or this machine, or something it needs is missing.
        """
        if self.objective is None:
            return None
        self.objective.check(self.recipe)
        return self.objective.build(model, folder)

    def build_model_config(self, vocab_size: int, eos_token_id: int | None = None) -> NormfreeConfig:
        """The model's configuration for a tokenizer of ``vocab_size``.

        Raises:
            InputError: an option of ``model`` is unknown, wrong, or one that the data decide.
        """
        decided = {
            "vocab_size": vocab_size,
            "n_positions": self.data.sequence_length,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
        }
        for name in decided:
            if name in self.model:
                raise InputError(f"model.{name} is decided by the data (tokenizer, data.sequence_length); leave it out")
        return NormfreeConfig.from_options({**self.model, **decided})

    def to_yaml(self, provenance: dict[str, Any]) -> str:
        """The file's text; ``provenance`` says where and with what it ran, and is not read back."""
        return yaml.safe_dump(
            {**self.model_dump(mode="json", exclude_none=True), PROVENANCE: provenance}, sort_keys=False
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        InputError: it cannot be read, is not YAML (object tags included), or holds something else.
    """
    try:
        content = parsed_yaml(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a configuration") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "syntax error"
        raise InputError(f"{path} is not valid YAML{where}: {problem}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a YAML mapping of options, not {type(content).__name__}")
    return content


def with_changes(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with some values changed, by their dotted names: ``recipe.tokens``.

    What a change makes meaningless goes: one kind of budget where the other is given, and the size of the vocabulary
    where a tokenizer is named. A batch size takes the micro-batch size along, unless that is changed too: the largest
    divisor up to the one there.

    Raises:
        InputError: a name's section is none of ``content``.
    """
    changed = copy.deepcopy(dict(content))
    for name, value in changes.items():
        *sections, option = name.split(".")
        section = changed
        for each in sections:
            if not isinstance(section.get(each), dict):
                raise unknown_name("section", each, [key for key in changed if isinstance(changed[key], dict)])
            section = section[each]
        section[option] = value
        if name == "recipe.tokens":
            section.pop("steps", None)
        elif name == "recipe.steps":
            section.pop("tokens", None)
        elif name == "data.tokenizer" and value != "train":
            section.pop("vocab_size", None)
    if "recipe.batch_size" in changes and "recipe.micro_batch_size" not in changes:
        recipe = changed["recipe"]
        recipe["micro_batch_size"] = fitting_micro_batch_size(
            recipe["batch_size"], recipe.get("micro_batch_size", Recipe.model_fields["micro_batch_size"].default)
        )
    return changed


def unknown_option(name: str, sections: Collection[str]) -> InputError:
    """An error for ``name`` being no option in one of the ``sections`` of a run, with the nearest as a suggestion."""
    allowed = [each for each in field_names(RunConfig) if each.partition(".")[0] in sections and "." in each]
    return unknown_name("option", name, allowed)


def model_fields() -> list[str]:
    """Dotted names of the options in ``model``, which no schema has."""
    return [f"model.{option}" for option in NormfreeConfig.option_names()]


def load_run_config(path: Path) -> RunConfig:
    """A run's configuration from a file written by hand or by a former run.

    Raises:
        InputError: the file cannot be read, or an option in it is unknown or wrong.
    """
    content = read_yaml(path)
    content.pop(PROVENANCE, None)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise invalid_fields(str(path), error, RunConfig, model_fields()) from error


def provenance(data: PackedData) -> dict[str, Any]:
    """Versions, hardware kind and corpus: what a number has to be reported with."""
    packages = ("normfree", "torch", "transformers", "tokenizers", "accelerate", "numpy")
    device = default_device()
    return {
        "corpus_fingerprint": data.fingerprint,
        "corpus": data.statistics,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_threads": torch.get_num_threads(),
    }
