"""``normfree remove-norm``: removal of the norms of a model given by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.data import Beginning, PackedData
from normfree.devices import on_device
from normfree.errors import InputError
from normfree.files import DEFAULT_CACHE_DIR
from normfree.locks import locked
from normfree.progress import display, duration, stage
from normfree.removal.curve import write_curve
from normfree.removal.evaluation import SEQUENCES, evaluate_removal, evaluation_texts
from normfree.removal.finetuning import RemovalDivergedError
from normfree.removal.layout import SCHEDULE_FILE
from normfree.removal.parts import QKNorms
from normfree.removal.plan import plan
from normfree.removal.removal import RemovalResult, remove
from normfree.removal.schedule import Order, RemovalSchedule, load_schedule
from normfree.training import RunConfig, StudyProgress, quantization_of
from normfree.training.prediction_comparison import PredictionComparison
from normfree.training.pretrained import starting_model
from normfree.training.training_plan import TrainingPlan, memory, seconds_a_step

MOST_SECONDS = 86_400.0
"""A removal that takes longer has to be asked for."""
SHORT_OPERATIONS = 1e13
"""Fewer floating-point operations than these take minutes on any machine; nothing is tried then."""


@dataclass(frozen=True)
class PretrainedRemoval:
    """A finished removal and its settings.

    evaluation: predictions of the removal's models and of the original on each corpus.
    run: the fine-tuning, as planned.
    beginning: the tokens that every sequence begins with.
    quantization: how the weights of the model were quantized; None if they were not.
    """

    result: RemovalResult
    evaluation: PredictionComparison
    run: RunConfig
    beginning: Beginning
    quantization: str | None


def remove_from_pretrained(
    source: str,
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    schedule: str | None = None,
    order: Order | None = None,
    qk_norms: QKNorms | None = None,
    seed: int = 0,
    lora_rank: int | None = None,
    vanilla: bool = True,
    eval_corpora: Sequence[str] = (),
    eval_sequences: int = SEQUENCES,
    device: str | None = None,
    yes: bool = False,
    cache_dir: Path = DEFAULT_CACHE_DIR,
) -> PretrainedRemoval:
    """Removes every norm of the model ``source`` by fine-tuning (:func:`~normfree.removal.removal.remove`).

    A stopped removal resumes when called again. One that has ended, good or bad, leaves its curve
    (:mod:`normfree.removal.curve`).

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        folder: for runs and models; locked meanwhile.
        changes: values of the fine-tuning by dotted name (:func:`~normfree.removal.plan.plan`).
        schedule: the name of a published schedule, or a YAML file; default: by depth and budget, for a run as GPT-2
            Small's, for any other model :func:`~normfree.removal.schedule.pretrained_schedule`.
        order: ``published`` or ``auto``, instead of the schedule's.
        qk_norms: whether norms of queries and keys stay or go, instead of the schedule's; by default they stay.
        seed: of the order of the data and of dropout.
        lora_rank: trains low-rank changes of this rank, and the norms; default: all weights.
        vanilla: also fine-tune with the norms kept, as a control.
        eval_corpora, eval_sequences: further corpora to compare predictions on, and the most sequences of each.
        device: ``cpu``, ``cuda`` or ``cuda:N``; default: CUDA where there is a device.
        yes: begin although it takes more than a day.
        cache_dir: of tokenized corpora.

    Raises:
        InputError: the model, the corpus, a change, the schedule or the folder cannot be used; or it takes more than a
            day by a trial of its steps, and neither has begun nor is ``yes`` given.
        RemovalDivergedError: the removal diverged too often.
    """
    with on_device(device):
        given = load_schedule(schedule) if schedule is not None else None
        planned = plan(source, changes=changes or {}, seed=seed, lora_rank=lora_rank, schedule=given, qk_norms=qk_norms)
        data = planned.prepare_data(cache_dir)
        run, chosen = planned.run, planned.schedule
        options = {"order": order, "qk_norms": qk_norms}
        chosen = chosen.model_copy(update={name: value for name, value in options.items() if value is not None})
        texts = evaluation_texts(run, data, eval_corpora, eval_sequences)
        if not (folder / SCHEDULE_FILE).exists():
            _check_time(run, data, vanilla=vanilla, is_taught=chosen.distillation_weight > 0, is_agreed=yes)
        total = run.recipe.n_tokens(run.data.sequence_length) * (2 if vanilla else 1)
        with locked(folder), StudyProgress(total, "remove-norm") as progress:
            result = _remove_with_curve(run, data, folder, chosen, vanilla, progress)
            evaluation = evaluate_removal(run, data, folder, texts, vanilla=vanilla)
    beginning = Beginning.of(data.tokenizer, run.data.beginning)
    return PretrainedRemoval(result, evaluation, run, beginning, quantization_of(source))


def _remove_with_curve(
    run: RunConfig, data: PackedData, folder: Path, schedule: RemovalSchedule, vanilla: bool, progress: StudyProgress
) -> RemovalResult:
    try:
        result = remove(
            run, data, folder, schedule, vanilla=vanilla, callbacks=lambda name, n: (progress.run(name, n),)
        )
    except RemovalDivergedError:
        write_curve(folder)
        raise
    write_curve(folder)
    return result


def _check_time(run: RunConfig, data: PackedData, *, vanilla: bool, is_taught: bool, is_agreed: bool) -> None:
    """Says what the fine-tunings take, and tries a step if they may take long.

    Raises:
        InputError: they would take more than :data:`MOST_SECONDS`, and that is not agreed.
    """
    assert run.start_from is not None, "there is a model to start from"
    run.recipe.check(run.data.sequence_length)
    model = starting_model(run.start_from, data)
    cost = TrainingPlan.of(run.recipe, run.data.sequence_length, model)
    # A teacher's forward pass takes a third of a step.
    n_run = (2 if vanilla else 1) + (1 / 3 if is_taught else 0)
    twice = "; twice: with the norms kept (--no-vanilla leaves it out)" if vanilla else ""
    teacher = f"; the original as teacher takes {memory(4 * cost.parameters)} more" if is_taught else ""
    display().say(f"Plan: {cost}{twice}{teacher}")
    if is_agreed or cost.operations * n_run < SHORT_OPERATIONS:
        return
    with stage("trying a step"):
        seconds = n_run * cost.steps * seconds_a_step(run.recipe, run.data.sequence_length, model)
    display().say(f"Training takes about {duration(seconds)}, by a trial of one micro-batch")
    n_tokens = cost.tokens * (2 if vanilla else 1)
    if seconds > MOST_SECONDS:
        raise InputError(
            f"this takes about {duration(seconds)} on {model.device.type} ({n_tokens:,} tokens); give --yes to begin "
            "it, or a smaller budget, e.g. --steps 300 --set recipe.batch_size=8 --set data.sequence_length=256"
        )
