"""Runs that start from a finished model; defaults of supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from normfree.data import PackedData, natural_rule, prepare_data
from normfree.errors import InputError, invalid_fields
from normfree.training.pretrained import LoadedModel
from normfree.training.run_config import RunConfig, unknown_option, with_changes

RECIPE: dict[str, Any] = {
    "batch_size": 16,
    "micro_batch_size": 8,
    "learning_rate": 1e-4,
    "learning_rate_decay": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "precision": "bf16",
    "telemetry_steps": 50,
    "eval_steps": 100,
    "save_steps": 100,
}
FROM_THE_RUN = ("precision", "attn_implementation")
LONGEST_SEQUENCE = 1024


def finetuning_run(
    loaded: LoadedModel,
    cache_dir: Path,
    *,
    changes: Mapping[str, Any],
    epochs: float,
    seed: int,
    lora_rank: int | None = None,
) -> tuple[RunConfig, PackedData]:
    """A run that starts from ``loaded`` on a corpus of prompts and completions, and its data.

    The model keeps its tokenizer, the beginning of its sequences, and its sequence length up to ``LONGEST_SEQUENCE``.

    Args:
        loaded: the model to start from.
        cache_dir: of packed tokens.
        changes: values by dotted name, ``data.corpus`` among them.
        epochs: budget in passes over the training split, if ``changes`` set none.
        seed: of the order of the data and of dropout.
        lora_rank: trains low-rank changes of this rank; default: all weights.

    Raises:
        InputError: no corpus is named, it cannot be used, or a name or value is wrong.
    """
    sections = _sections(loaded, changes, lora_rank)
    recipe = sections["recipe"]
    has_budget = "steps" in recipe or "tokens" in recipe
    if not has_budget:
        recipe["steps"] = 1  # checks all else before the data are prepared, which takes long
    run = continued_run(loaded.source, "finetuned", seed, sections, "finetune")
    data = prepare_data(run.data, cache_dir)
    loaded.check_tokenizer(data.tokenizer, "the tokenizer of the corpus")
    if not has_budget:
        recipe["steps"] = max(1, math.ceil(epochs * len(data.train) / run.recipe.batch_size))
        run = continued_run(loaded.source, "finetuned", seed, sections, "finetune")
    return run, data


def changed_sections(sections: Mapping[str, Any], changes: Mapping[str, Any], lora_rank: int | None) -> dict[str, Any]:
    """``sections`` of a run's configuration, and ``lora`` for a rank, with ``changes`` by dotted name.

    Raises:
        InputError: a name is not of an option in one of the sections.
    """
    sections = {**sections, **({} if lora_rank is None else {"lora": {"rank": lora_rank}})}
    for name in changes:
        section, _, option = name.partition(".")
        if section not in sections or not option:
            raise unknown_option(name, sections)
    return with_changes(sections, changes)


def continued_run(source: str, configuration: str, seed: int, sections: Mapping[str, Any], command: str) -> RunConfig:
    """A run that starts from the model ``source``, with these ``sections`` of its configuration.

    Raises:
        InputError: a value is wrong; the message names ``command``.
    """
    start = str(Path(source).resolve()) if Path(source).exists() else source
    named = {"model_name": source, "configuration": configuration, "seed": seed, "model": {}, "start_from": start}
    try:
        return RunConfig.model_validate({**named, **sections})
    except ValidationError as error:
        raise invalid_fields(command, error, RunConfig) from error


def _sections(loaded: LoadedModel, changes: Mapping[str, Any], lora_rank: int | None) -> dict[str, Any]:
    """The sections data, recipe and lora with ``changes``.

    Raises:
        InputError: no corpus is named, or a name is wrong.
    """
    trained = loaded.run
    length = trained.data.sequence_length if trained is not None else min(LONGEST_SEQUENCE, loaded.n_positions or 512)
    recipe = RECIPE if trained is None else RECIPE | {name: getattr(trained.recipe, name) for name in FROM_THE_RUN}
    sections: dict[str, Any] = {
        "data": {"tokenizer": str(Path(loaded.checkpoint).resolve()), "sequence_length": length, "cut": "packed"},
        "recipe": recipe,
    }
    if not Path(loaded.checkpoint).exists():
        sections["data"]["tokenizer"] = loaded.checkpoint
    sections = changed_sections(sections, changes, lora_rank)
    if "corpus" not in sections["data"]:
        raise InputError("name what to fine-tune on with --corpus, such as pairs:FILE.jsonl")
    if "beginning" not in sections["data"]:
        rule = natural_rule(sections["data"]["tokenizer"]) if trained is None else trained.data.beginning
        sections["data"]["beginning"] = rule
    return sections
