"""Defaults of a removal: the published recipe, and the data of the run that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from normfree.data import PackedData, natural_rule, prepare_data, same_data
from normfree.devices import default_device
from normfree.errors import InputError
from normfree.removal.parts import QKNorms, check_removable, parts_to_remove
from normfree.removal.schedule import (
    PRETRAINED_RECIPE,
    RemovalSchedule,
    ScheduleRecipe,
    automatic_schedule,
    pretrained_schedule,
)
from normfree.training import RunConfig, load_pretrained
from normfree.training.finetuning import changed_sections, continued_run
from normfree.training.pretrained import check_embeddings

PUBLISHED_STEPS = 300
SHARE_OF_TRAINING = 0.05
"""Budget for a Normfree run, as a share of the tokens it was trained on."""
RECIPE: dict[str, Any] = {
    "learning_rate": 6e-4,
    "learning_rate_decay": "cosine",
    "final_learning_rate_ratio": 0.5,
    "warmup_ratio": 25 / PUBLISHED_STEPS,
    "weight_decay": 0.01,
    "precision": "bf16",
    "logging_steps": 1,
    "telemetry_steps": 25,
}
"""The recipe of GPT-2 Small in "Transformers Don't Need LayerNorm at Inference Time", logging every step."""
PUBLISHED_BATCH = {"batch_size": 512, "micro_batch_size": 8, "steps": PUBLISHED_STEPS}
PUBLISHED_LENGTH = 1024
CPU_BATCH = {"batch_size": 8, "micro_batch_size": 8, "steps": PUBLISHED_STEPS}
CPU_LENGTH = 256
"""A model of 135 M parameters takes hours on two cores with these, and weeks with the published ones."""
FROM_THE_RUN = ("batch_size", "micro_batch_size", "precision", "attn_implementation")
CHECKPOINTS = 15
EVALUATIONS = 3


@dataclass(frozen=True)
class Plan:
    """A fine-tuning run that starts from a model with ``n_embedding`` tokens.

    schedule: of its removals.
    fingerprint: of the tokens that it must be trained on, for a model that is a run.
    """

    run: RunConfig
    schedule: RemovalSchedule
    fingerprint: str | None
    n_embedding: int

    def prepare_data(self, cache_dir: Path) -> PackedData:
        """The run's tokens.

        Raises:
            InputError: the corpus cannot be used, or has changed since the run and its tokens are not in the cache, or
                its tokenizer has tokens without an embedding.
        """
        if self.fingerprint is not None:
            return same_data(self.run.data, cache_dir, self.fingerprint)
        data = prepare_data(self.run.data, cache_dir)
        check_embeddings(self.run.model_name, self.n_embedding, data.tokenizer, "the tokenizer of the corpus")
        return data


def plan(
    source: str,
    *,
    changes: Mapping[str, Any],
    seed: int,
    lora_rank: int | None = None,
    schedule: RemovalSchedule | None = None,
    qk_norms: QKNorms | None = None,
) -> Plan:
    """The fine-tuning that removes the norms of the model ``source``.

    A Normfree run is fine-tuned on its own data, in batches of the same size, for ``SHARE_OF_TRAINING`` of its tokens;
    any other model on the corpus in ``changes``, with its own tokenizer and what that puts before a text, for
    ``PUBLISHED_STEPS`` of 512 sequences of 1,024 tokens, or on a CPU of 8 of 256. The ``recipe`` of a ``schedule``
    overrides both, and ``changes`` override it: values by dotted name, such as ``data.corpus``, ``recipe.steps`` and,
    with a ``lora_rank``, ``lora.alpha``. Without a ``schedule`` a run has
    :func:`~normfree.removal.schedule.automatic_schedule`, any other model
    :func:`~normfree.removal.schedule.pretrained_schedule`; ``qk_norms`` is theirs.

    Raises:
        InputError: the model cannot be loaded, its norms cannot be removed, no corpus is named for a model that is no
            run, or a name or value is wrong.
    """
    loaded = load_pretrained(source)
    trained = loaded.run
    default = ScheduleRecipe() if trained is not None else PRETRAINED_RECIPE
    brought = (default if schedule is None else schedule.recipe).model_dump(exclude_none=True)
    is_small = default_device().type == "cpu" and "steps" not in brought
    recipe: dict[str, Any] = RECIPE | (CPU_BATCH if is_small else PUBLISHED_BATCH)
    if trained is None:
        length = min(CPU_LENGTH if is_small else PUBLISHED_LENGTH, loaded.n_positions or 512)
        data: dict[str, Any] = {"tokenizer": loaded.checkpoint, "sequence_length": length}
    else:
        data = trained.data.model_dump(exclude_unset=True)
        recipe |= {name: getattr(trained.recipe, name) for name in FROM_THE_RUN}
        recipe["steps"] = max(1, round(SHARE_OF_TRAINING * trained.recipe.n_steps(trained.data.sequence_length)))
    recipe |= brought
    sections = changed_sections({"data": data, "recipe": recipe}, changes, lora_rank)
    if trained is None and "corpus" not in sections["data"]:
        raise InputError(f"{source} is no run with data of its own; name a corpus to fine-tune on with --corpus")
    if trained is None and "beginning" not in sections["data"] and sections["data"]["tokenizer"] != "train":
        sections["data"]["beginning"] = natural_rule(sections["data"]["tokenizer"])
    run = continued_run(source, "removal", seed, sections, "remove-norm")
    if schedule is None:
        automatic = pretrained_schedule if trained is None else automatic_schedule
        config, n_step = loaded.as_normfree().config, run.recipe.n_steps(run.data.sequence_length)
        check_removable(config, qk_norms or "keep")
        schedule = automatic(config.n_layer, n_step, parts_to_remove(config, qk_norms or "keep"), qk_norms or "keep")
    fingerprint = loaded.fingerprint if run.data == loaded.data else None
    return Plan(_with_checkpoints(run), schedule, fingerprint, loaded.n_embedding)


def _with_checkpoints(run: RunConfig) -> RunConfig:
    """``run`` with enough checkpoints that a diverged removal loses few steps, and a few evaluations."""
    steps = run.recipe.n_steps(run.data.sequence_length)
    every = {"save_steps": ceil(steps / CHECKPOINTS), "eval_steps": ceil(steps / EVALUATIONS)}
    changed = {name: value for name, value in every.items() if name not in run.recipe.model_fields_set}
    return run.model_copy(update={"recipe": run.recipe.model_copy(update=changed)})
