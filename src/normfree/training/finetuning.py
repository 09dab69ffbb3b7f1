"""Supervised fine-tuning: a run with defaults for what its user does not set."""

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
    """A run that continues from ``loaded`` on a corpus of prompts and completions, and its data.

    The model keeps its tokenizer, what its sequences begin with, and its sequence length up to ``LONGEST_SEQUENCE``.

    Args:
        loaded: the model to begin with.
        cache_dir: where packed tokens are kept.
        changes: any value by its dotted name; ``data.corpus`` among them.
        epochs: budget in passes over the training split, where ``changes`` give none.
        seed: of the order of the data and of dropout.
        lora_rank: with it, low-rank changes train.

    Raises:
        InputError: no corpus is named, it cannot be used, or a name or value is wrong.
    """
    sections = _sections(loaded, changes, lora_rank)
    has_budget = bool({"steps", "tokens"} & sections["recipe"].keys())
    content = {
        "model_name": loaded.source,
        "configuration": "finetuned",
        "seed": seed,
        "model": {},
        "start_from": str(Path(loaded.source).resolve()) if Path(loaded.source).exists() else loaded.source,
        **sections,
    }
    try:
        # Checked before the data are prepared, which takes long; epochs become steps afterwards.
        run = RunConfig.model_validate(
            content if has_budget else {**content, "recipe": {**sections["recipe"], "steps": 1}}
        )
        data = prepare_data(run.data, cache_dir)
        loaded.check_tokenizer(data.tokenizer, "the tokenizer of the corpus")
        if not has_budget:
            steps = max(1, math.ceil(epochs * len(data.train) / run.recipe.batch_size))
            run = RunConfig.model_validate({**content, "recipe": {**sections["recipe"], "steps": steps}})
    except ValidationError as error:
        raise invalid_fields("finetune", error, RunConfig) from error
    return run, data


def _sections(loaded: LoadedModel, changes: Mapping[str, Any], lora_rank: int | None) -> dict[str, Any]:
    """The sections of a run's configuration (data, recipe, lora) that ``changes`` change.

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
    if lora_rank is not None:
        sections["lora"] = {"rank": lora_rank}
    for name in changes:
        if name.partition(".")[0] not in sections:
            raise unknown_option(name, sections)
    sections = with_changes(sections, changes)
    if "corpus" not in sections["data"]:
        raise InputError("name what to fine-tune on with --corpus, such as pairs:FILE.jsonl")
    if "beginning" not in sections["data"]:
        rule = natural_rule(sections["data"]["tokenizer"]) if trained is None else trained.data.beginning
        sections["data"]["beginning"] = rule
    return sections
