"""Removal schedules: YAML files that say when each norm goes, and their steps for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.modeling import NormfreeConfig
from normfree.removal.parts import BLOCK_PARTS, SPECIAL_PARTS, Part, QKNorms, block_parts, norms_to_remove
from normfree.removal.removable import Statistic, Treatment
from normfree.training.run_config import read_yaml

PUBLISHED_PARTS: tuple[Part, ...] = ("ffn", "attention_qk", "attention_v", "final")
"""The norms of GPT-2."""
Order = Literal["published", "auto"]
Place = tuple[float, Part, int | None]
"""A removal whose step is not rounded yet."""
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


PRETRAINED_RECIPE = ScheduleRecipe(learning_rate=2e-4, final_learning_rate_ratio=0.1)
"""Of :func:`pretrained_schedule`."""


class RemovalSchedule(BaseModel):
    """A schedule of "Transformers Don't Need LayerNorm at Inference Time", Section 3, and what pretrained models need.

    stages: in order; the first begins after ``massive_steps``.
    order: ``published`` removes as ``stages`` say; ``auto`` removes norms at the same steps, but in descending order of
        what each costs alone when the first one is about to go (:mod:`normfree.removal.order`).
    std_statistic: of the tokens' stds, the constant: their mean, median, or a quantile, from 0 to 1.
    std_momentum: of the running mean of this statistic, updated every micro-batch; 0 keeps the last one's.
    ramp_steps: from a token's own std to the constant, own^(1 - λ) · constant^λ with λ in steps of 1 / ``ramp_steps``;
        0 and 1 switch at once.
    special_ramp_steps: from their stage on, in which special tokens move to the common std likewise; default:
        ``ramp_steps``.
    qk_norms: whether norms of queries and keys stay in the model or go too.
    special_tokens: tokens with their own std (see :class:`~normfree.removal.removable.SpecialTokens`).
    special_factor: a token is massive before a norm if its std there is more than this many times the median of its
        sequence.
    std_loss, std_loss_norms, std_loss_weight: the auxiliary loss (see :class:`~normfree.removal.std_losses.StdLosses`).
    std_loss_ramp_steps: over which its weight rises from 0.
    distillation_weight: share of KL(original ‖ model) in the loss, the rest is cross-entropy
        (:class:`~normfree.removal.distillation.Distilled`).
    random_sequences: :func:`~normfree.removal.std_losses.random_sequences` that each micro-batch adds to these losses:
        in rare tokens and repetitions a network without norms overflows.
    massive_steps: steps before the first stage, for the penalty on massive tokens.
    massive_weight: of this penalty, which stays to the end.
    recipe: the schedule's recipe; values that the user gives override it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[Stage, ...]
    order: Order = "published"
    std_statistic: Statistic | Annotated[float, Field(ge=0, le=1)] = "mean"
    std_momentum: float = Field(default=0.9, ge=0, lt=1)
    ramp_steps: int = Field(default=0, ge=0)
    special_ramp_steps: int | None = Field(default=None, ge=0)
    qk_norms: QKNorms = "keep"
    special_tokens: Treatment = "separate"
    special_factor: float = Field(default=8.0, gt=1, allow_inf_nan=False)
    std_loss: Literal["squared", "log_ratio"] = "squared"
    std_loss_norms: Literal["final", "all"] = "final"
    std_loss_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    std_loss_ramp_steps: int = Field(default=0, ge=0)
    random_sequences: int = Field(default=0, ge=0)
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    massive_steps: int = Field(default=0, ge=0)
    massive_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    recipe: ScheduleRecipe = ScheduleRecipe()

    def removals(self, model: NormfreeConfig) -> list[Removal]:
        """Every removal for a model of that configuration, in order. Steps are rounded after they are summed.

        Raises:
            InputError: a norm of the model is removed twice or never, or a norm is named that it does not have.
        """
        removals = [Removal(round(step), part, layer) for step, part, layer in self._places(model)]
        self._check(model, removals)
        return removals

    def last_step(self, model: NormfreeConfig) -> int:
        """The first step in which every norm divides by a constant."""
        return self.end_of(self.removals(model))

    def end_of(self, removals: Iterable[Removal]) -> int:
        """The first step in which all ``removals`` and their ramps are over."""
        return max(each.step + max(self.ramp_of(each.part) - 1, 0) for each in removals)

    def ramp_of(self, part: Part) -> int:
        """The steps of the ramp of a part."""
        own = self.special_ramp_steps if part in SPECIAL_PARTS else None
        return self.ramp_steps if own is None else own

    def stretched(self, model: NormfreeConfig, step: int, factor: float) -> RemovalSchedule:
        """A copy whose waits after ``step`` are scaled by ``factor``."""
        places, last, moved = [], float(self.massive_steps), float(self.massive_steps)
        for place, part, layer in self._places(model):
            moved += (place - last) * (factor if place > step else 1)
            places.append((moved, part, layer))
            last = place
        return self._at(places)

    def reordered(self, model: NormfreeConfig, norms: Iterable[tuple[Part, int | None]]) -> RemovalSchedule:
        """A copy that removes ``norms`` in that order, at the steps at which this one removes norms."""
        rest = iter(norms)
        return self._at(
            (step, part, layer) if part in SPECIAL_PARTS else (step, *next(rest))
            for step, part, layer in self._places(model)
        ).model_copy(update={"order": "published"})

    def _at(self, places: Iterable[Place]) -> RemovalSchedule:
        """A copy with these removals, a stage each."""
        stages, last = [], float(self.massive_steps)
        for place, part, layer in places:
            stages.append(Stage(part=part, after=place - last, layers=None if layer is None else (layer,)))
            last = place
        return self.model_copy(update={"stages": tuple(stages)})

    def _places(self, model: NormfreeConfig) -> Iterator[Place]:
        step = float(self.massive_steps)
        for stage in self.stages:
            layers: tuple[int | None, ...] = (None,)
            if stage.part in BLOCK_PARTS:
                layers = stage.layers if stage.layers is not None else self._layers_with(stage.part, model)
            for place, layer in enumerate(layers):
                step += stage.gap if place else stage.after
                yield step, stage.part, layer

    def _layers_with(self, part: Part, model: NormfreeConfig) -> tuple[int, ...]:
        """The layers that have the part; all if none has it, which is refused."""
        found = tuple(layer for layer in range(model.n_layer) if part in block_parts(model, layer, self.qk_norms))
        return found or tuple(range(model.n_layer))

    def _check(self, model: NormfreeConfig, removals: list[Removal]) -> None:
        wanted = norms_to_remove(model, self.qk_norms)
        has_end = model.eos_token_id is not None
        if self.special_tokens == "measured":
            wanted.append(("massive_tokens", None))
        else:
            wanted.append(("first_token", None))
            if has_end:
                wanted.append(("end_of_text", None))
        found = [(each.part, each.layer) for each in removals if has_end or each.part != "end_of_text"]
        for each in found:
            if found.count(each) > 1:
                raise InputError(f"the schedule removes {part_name(*each)} twice; name it once")
            if each not in wanted:
                raise InputError(f"the schedule removes {part_name(*each)}, which the model has not; leave it out")
        for each in wanted:
            if each not in found:
                raise InputError(f"the schedule never removes {part_name(*each)}; add a stage for it")


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


def automatic_schedule(
    n_layer: int, n_step: int, parts: Sequence[Part] = PUBLISHED_PARTS, qk_norms: QKNorms = "keep"
) -> RemovalSchedule:
    """The schedule published for GPT-2 Small, scaled to another depth and number of steps.

    The original begins at step 20 of 300, waits 2, 2 and 3 steps for the three parts of 12 blocks, and removes the last
    norm at step 104. All waits keep their share of the budget, divided among a model's layers; other ``parts`` of
    blocks wait 2 steps.
    """
    unit, special = n_step / 300 * 12 / n_layer, n_step / 300
    stages: list[Stage] = []
    wait = max(1.0, 20 * special)
    for part in parts:
        gap = (3 if part == "attention_v" else 2) * unit
        stages.append(Stage(part=part, after=wait, gap=gap if part in BLOCK_PARTS else 0))
        wait = gap
    stages += [Stage(part="end_of_text", after=2 * special), Stage(part="first_token", after=10 * special)]
    std_loss_weight = 0.1 if "final" in parts else 0.0
    return RemovalSchedule(stages=tuple(stages), std_loss_weight=std_loss_weight, qk_norms=qk_norms)


def pretrained_schedule(
    n_layer: int, n_step: int, parts: Sequence[Part] = PUBLISHED_PARTS, qk_norms: QKNorms = "keep"
) -> RemovalSchedule:
    """A schedule for pretrained models, which have massive tokens: what went furthest on SmolLM2-135M.

    The first twelfth of the budget makes massive tokens unnecessary. Then norms go in the order of their costs: the
    costliest, a quarter of the norms or more, in a quarter of it, the others in another. In a third quarter goes the
    bound on tokens that are massive nevertheless; a tenth of the budget is left to settle.
    """
    counts = {part: n_layer if part in BLOCK_PARTS else 1 for part in parts}
    slow: list[Part] = []  # any parts will do: what goes at their places is measured
    while 4 * sum(counts[part] for part in slow) < sum(counts.values()):
        slow.append(parts[len(slow)])
    n_slow = sum(counts[part] for part in slow)
    n_fast = sum(counts.values()) - n_slow
    gaps = {part: n_step / 4 / (n_slow if part in slow else n_fast) for part in parts}
    stages = [Stage(part=part, after=gap, gap=gap if part in BLOCK_PARTS else 0) for part, gap in gaps.items()]
    stages[0] = stages[0].model_copy(update={"after": max(1.0, stages[0].after)})
    return RemovalSchedule(
        stages=(*stages, Stage(part="massive_tokens", after=n_step / 30)),
        order="auto",
        std_statistic="median",
        ramp_steps=max(1, round(n_step / 60)),
        special_ramp_steps=max(1, round(n_step / 4)),
        qk_norms=qk_norms,
        special_tokens="measured",
        special_factor=2.5,
        std_loss="log_ratio",
        std_loss_norms="all",
        std_loss_weight=10.0,
        std_loss_ramp_steps=max(1, round(n_step / 12)),
        random_sequences=1,
        massive_steps=round(n_step / 12),
        massive_weight=0.5,
        recipe=PRETRAINED_RECIPE,
    )


def part_name(part: Part, layer: int | None) -> str:
    """A part as messages call it, such as ``ffn of layer 3``."""
    return part if layer is None else f"{part} of layer {layer}"
