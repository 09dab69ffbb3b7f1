"""Removal schedules: YAML files that say when each norm goes, and their steps for a model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.modeling import NormfreeConfig
from normfree.removal.removable import Treatment
from normfree.training.run_config import read_yaml

Part = Literal["ffn", "attention_qk", "attention_v", "final", "end_of_text", "first_token"]
BLOCK_PARTS: tuple[Part, ...] = ("ffn", "attention_qk", "attention_v")
"""Readers of the norms in every block: the feed-forward network; queries and keys; values."""
SPECIAL_PARTS: tuple[Part, ...] = ("end_of_text", "first_token")
"""Parts that are not norms but tokens, which lose their own std."""
SCHEDULES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class Removal(NamedTuple):
    """Removes ``part`` of ``layer`` (None outside of blocks) at the beginning of optimizer step ``step`` (from 0)."""

    step: int
    part: Part
    layer: int | None


class Stage(BaseModel):
    """Norms of one kind, removed in turn.

    part: a reader of norms, or special tokens.
    after: steps from the previous removal (or step 0) to the first of this stage.
    gap: steps from one layer to the next.
    layers: from 0, in order of removal; default: all, from the first. A part may have several stages.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: Part
    after: float = Field(ge=0)
    gap: float = Field(default=0, ge=0)
    layers: tuple[int, ...] | None = None


class ScheduleRecipe(BaseModel):
    """The part of a :class:`~normfree.training.Recipe` that a schedule was made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    final_learning_rate_ratio: float | None = Field(default=None, ge=0, lt=1)
    decay_steps: int | None = Field(default=None, ge=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class RemovalSchedule(BaseModel):
    """A schedule of "Transformers Don't Need LayerNorm at Inference Time", Section 3.

    stages: in order.
    std_momentum: of the running mean of each norm's std, updated every micro-batch; 0 keeps the last one's.
    std_loss_weight: of the auxiliary loss, the mean squared difference between the stds of all tokens before the final
        norm and their mean.
    distillation_weight: share of KL(original ‖ model) in the loss, the rest is cross-entropy
        (:class:`~normfree.removal.distillation.Distilled`).
    special_tokens: tokens with their own std (see :class:`~normfree.removal.removable.SpecialTokens`).
    recipe: the schedule's recipe; values that the user gives override it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[Stage, ...]
    std_momentum: float = Field(default=0.9, ge=0, lt=1)
    std_loss_weight: float = Field(default=0.0, ge=0)
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    special_tokens: Treatment = "separate"
    recipe: ScheduleRecipe = ScheduleRecipe()

    def removals(self, model: NormfreeConfig) -> list[Removal]:
        """Every removal for a model of that configuration, in order. Steps are rounded after they are summed.

        Raises:
            InputError: a norm of the model is removed twice or never, or a norm is named that it does not have.
        """
        removals = [Removal(round(step), part, layer) for step, part, layer in self._places(model.n_layer)]
        self._check(model, removals)
        return removals

    def stretched(self, model: NormfreeConfig, step: int, factor: float) -> RemovalSchedule:
        """A copy whose waits after ``step`` are scaled by ``factor``."""
        stages, last = [], 0.0
        for place, part, layer in self._places(model.n_layer):
            wait = (place - last) * (factor if place > step else 1)
            stages.append(Stage(part=part, after=wait, layers=None if layer is None else (layer,)))
            last = place
        return self.model_copy(update={"stages": tuple(stages)})

    def _places(self, n_layer: int) -> Iterator[tuple[float, Part, int | None]]:
        step = 0.0
        for stage in self.stages:
            is_block = stage.part in BLOCK_PARTS
            layers = (stage.layers if stage.layers is not None else tuple(range(n_layer))) if is_block else (None,)
            for place, layer in enumerate(layers):
                step += stage.gap if place else stage.after
                yield step, stage.part, layer

    def _check(self, model: NormfreeConfig, removals: list[Removal]) -> None:
        wanted: list[tuple[Part, int | None]] = []
        if model.norm != "none":
            wanted += [(part, layer) for part in BLOCK_PARTS for layer in range(model.n_layer)]
        if model.final_norm != "none":
            wanted.append(("final", None))
        wanted.append(("first_token", None))
        has_end = model.eos_token_id is not None
        if has_end:
            wanted.append(("end_of_text", None))
        found = [(each.part, each.layer) for each in removals if has_end or each.part != "end_of_text"]
        for each in found:
            if found.count(each) > 1:
                raise InputError(f"the schedule removes {_named(*each)} twice; name it once")
            if each not in wanted:
                raise InputError(f"the schedule removes {_named(*each)}, which the model has not; leave it out")
        for each in wanted:
            if each not in found:
                raise InputError(f"the schedule never removes {_named(*each)}; add a stage for it")


def load_schedule(name: str) -> RemovalSchedule:
    """A published schedule by the name of its model, or one from a YAML file.

    Raises:
        InputError: there is no such schedule, or the file is not one.
    """
    if name in SCHEDULES:
        content = read_yaml(Path(str(files("normfree.removal") / "schedules" / f"{name}.yaml")))
    elif Path(name).is_file():
        content = read_yaml(Path(name))
    else:
        raise unknown_name("removal schedule", name, [*SCHEDULES, "a YAML file"])
    try:
        return RemovalSchedule.model_validate(content)
    except ValidationError as error:
        raise invalid_fields(name, error, RemovalSchedule) from error


def automatic_schedule(n_layer: int, n_step: int) -> RemovalSchedule:
    """The schedule published for GPT-2 Small, scaled to another depth and number of steps.

    The original begins at step 20 of 300, waits 2, 2 and 3 steps for the three parts of 12 blocks, and removes the last
    norm at step 104. All waits keep their share of the budget, divided among a model's layers.
    """
    unit = n_step / 300 * 12 / n_layer
    special = n_step / 300
    return RemovalSchedule(
        stages=(
            Stage(part="ffn", after=max(1.0, 20 * special), gap=2 * unit),
            Stage(part="attention_qk", after=2 * unit, gap=2 * unit),
            Stage(part="attention_v", after=2 * unit, gap=3 * unit),
            Stage(part="final", after=3 * unit),
            Stage(part="end_of_text", after=2 * special),
            Stage(part="first_token", after=10 * special),
        ),
        std_loss_weight=0.1,
    )


def _named(part: Part, layer: int | None) -> str:
    return part if layer is None else f"{part} of layer {layer}"
