"""``normfree remove-norm``: removal of the norms of a model given by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.data import Beginning
from normfree.devices import on_device
from normfree.files import DEFAULT_CACHE_DIR
from normfree.locks import locked
from normfree.removal.plan import plan
from normfree.removal.removal import RemovalResult, remove
from normfree.removal.schedule import load_schedule
from normfree.training import RunConfig, StudyProgress, quantization_of


@dataclass(frozen=True)
class PretrainedRemoval:
    """A finished removal and its settings.

    run: the fine-tuning, as planned.
    beginning: the tokens that every sequence begins with.
    quantization: how the weights of the model were quantized; None if they were not.
    """

    result: RemovalResult
    run: RunConfig
    beginning: Beginning
    quantization: str | None


def remove_from_pretrained(
    source: str,
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    schedule: str | None = None,
    seed: int = 0,
    lora_rank: int | None = None,
    vanilla: bool = True,
    device: str | None = None,
    cache_dir: Path = DEFAULT_CACHE_DIR,
) -> PretrainedRemoval:
    """Removes every norm of the model ``source`` by fine-tuning (:func:`~normfree.removal.removal.remove`).

    A stopped removal resumes when called again.

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        folder: for runs and models; locked meanwhile.
        changes: values of the fine-tuning by dotted name (:func:`~normfree.removal.plan.plan`).
        schedule: the name of a published schedule, or a YAML file; default: by depth and budget.
        seed: of the order of the data and of dropout.
        lora_rank: trains low-rank changes of this rank, and the norms; default: all weights.
        vanilla: also fine-tune with the norms kept, as a control.
        device: ``cpu``, ``cuda`` or ``cuda:N``; default: CUDA where there is a device.
        cache_dir: of tokenized corpora.

    Raises:
        InputError: the model, the corpus, a change, the schedule or the folder cannot be used.
        RemovalDivergedError: the removal diverged too often.
    """
    with on_device(device):
        chosen = load_schedule(schedule) if schedule is not None else None
        planned = plan(source, changes=changes or {}, seed=seed, lora_rank=lora_rank, schedule=chosen)
        data = planned.prepare_data(cache_dir)
        run = planned.run
        total = run.recipe.n_tokens(run.data.sequence_length) * (2 if vanilla else 1)
        with locked(folder), StudyProgress(total, "remove-norm") as progress:
            result = remove(
                run,
                data,
                folder,
                chosen,
                vanilla=vanilla,
                callbacks=lambda variant, n_tokens: (progress.run(variant, n_tokens),),
            )
    return PretrainedRemoval(result, run, Beginning.of(data.tokenizer, run.data.beginning), quantization_of(source))
