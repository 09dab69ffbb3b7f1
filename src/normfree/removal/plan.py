"""What a removal trains on and how, where its user does not say: the published recipe, and the data of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.training import LoadedModel, RunConfig
from normfree.training.configuration import CONFIG_FILE, load_run_config

PUBLISHED_STEPS = 300
SHARE_OF_TRAINING = 0.05
"""Budget for a run of ours, as a share of the tokens it was trained on."""
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
"""That of GPT-2 Small in "Transformers Don't Need LayerNorm at Inference Time". The loss of each step is watched."""
LARGE = {"batch_size": 512, "micro_batch_size": 8, "steps": PUBLISHED_STEPS}
LARGE_SEQUENCE_LENGTH = 1024
FROM_THE_RUN = ("batch_size", "micro_batch_size", "precision", "attn_implementation")
CHECKPOINTS = 15
EVALUATIONS = 3


def plan(loaded: LoadedModel, *, changes: Mapping[str, Any], seed: int) -> RunConfig:
    """The run that takes the norms out of ``loaded``: fine-tuning that starts from it.

    A run of ours is fine-tuned on the data it was trained on, in batches of the same size, for ``SHARE_OF_TRAINING`` of
    its tokens; any other model on the corpus that ``changes`` name, with its own tokenizer, for ``PUBLISHED_STEPS`` of
    512 sequences. ``changes`` set any value, by its dotted name: ``data.corpus``, ``recipe.steps``.

    Raises:
        InputError: no corpus is named for a model that is no run, or a name or value is wrong.
    """
    data: dict[str, Any] = {} if loaded.data is None else loaded.data.model_dump(exclude_unset=True)
    recipe: dict[str, Any] = RECIPE | LARGE
    if loaded.data is None:
        data |= {
            "tokenizer": loaded.checkpoint,
            "sequence_length": min(LARGE_SEQUENCE_LENGTH, loaded.n_positions or 512),
        }
    else:
        trained = load_run_config(_run_folder(loaded) / CONFIG_FILE).recipe
        recipe |= {name: getattr(trained, name) for name in FROM_THE_RUN}
        recipe["steps"] = max(1, round(SHARE_OF_TRAINING * trained.n_steps(loaded.data.sequence_length)))
    sections = {"data": data, "recipe": recipe}
    for name, value in changes.items():
        section, _, option = name.partition(".")
        if section not in sections or not option:
            raise unknown_name("option", name, [f"{each}.OPTION" for each in sections])
        sections[section][option] = value
        if name == "recipe.tokens":
            recipe.pop("steps", None)
    if loaded.data is None and "corpus" not in data:
        raise InputError(f"{loaded.source} is no run with data of its own; name a corpus to fine-tune on with --corpus")
    content = {
        "model_name": loaded.source,
        "configuration": "removal",
        "seed": seed,
        "model": {},
        "data": data,
        "recipe": recipe,
        "start_from": str(Path(loaded.source).resolve()) if Path(loaded.source).exists() else loaded.source,
    }
    try:
        run = RunConfig.model_validate(content)
    except ValidationError as error:
        raise invalid_fields("remove-norm", error, RunConfig) from error
    return _with_checkpoints(run)


def _with_checkpoints(run: RunConfig) -> RunConfig:
    """Enough of them that a removal that diverges need not go back far, and a few evaluations on the way."""
    steps = run.recipe.n_steps(run.data.sequence_length)
    every = {"save_steps": max(1, steps // CHECKPOINTS), "eval_steps": max(1, steps // EVALUATIONS)}
    changed = {name: value for name, value in every.items() if name not in run.recipe.model_fields_set}
    return run.model_copy(update={"recipe": run.recipe.model_copy(update=changed)})


def _run_folder(loaded: LoadedModel) -> Path:
    source = Path(loaded.source)
    return source if (source / CONFIG_FILE).is_file() else source.parent
