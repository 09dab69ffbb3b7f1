"""One run from its file, or fine-tuning of a finished model: what ``normfree train`` and ``normfree finetune`` do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.data import Beginning, prepare_data, same_data
from normfree.devices import on_device
from normfree.files import DEFAULT_CACHE_DIR
from normfree.processes import main_first
from normfree.training import (
    RunConfig,
    RunResult,
    StudyProgress,
    load_pretrained,
    load_run_config,
    quantization_of,
    train,
)
from normfree.training.finetuning import finetuning_run
from normfree.training.run_folder import CONFIG_FILE, recorded


@dataclass(frozen=True)
class FinetunedModel:
    """A finished fine-tuning.

    run: its folder and what it measured on the evaluation tokens.
    beginning: the tokens that every sequence begins with.
    quantization: how the weights of the model that it started from were quantized; None if they were not.
    """

    run: RunResult
    beginning: Beginning
    quantization: str | None


def train_file(
    config: Path, folder: Path, *, device: str | None = None, cache_dir: Path = DEFAULT_CACHE_DIR
) -> RunResult:
    """Trains the run that the YAML file ``config`` describes, in ``folder``; resumes from its last checkpoint.

    A run that was begun keeps its own tokens, and so does one whose file has the ``provenance`` of an earlier run.
    Collective: call from every rank.

    Args:
        config: a run's YAML file, such as the ``config.yaml`` of an earlier run.
        folder: run folder.
        device: ``cpu``, ``cuda`` or ``cuda:N``; default: CUDA where there is a device.
        cache_dir: where tokenized corpora are kept and found again.

    Raises:
        InputError: the file, the corpus or the folder cannot be used, or the corpus has changed.
        RunFailedError: training could not continue.
    """
    with on_device(device):
        return _train_file(load_run_config(config), config, folder, cache_dir)


def _train_file(run: RunConfig, config: Path, folder: Path, cache_dir: Path) -> RunResult:
    fingerprint = recorded(folder / CONFIG_FILE, "corpus_fingerprint") or recorded(config, "corpus_fingerprint")
    if fingerprint is None:
        data = main_first(lambda: prepare_data(run.data, cache_dir))
    else:
        data = main_first(lambda: same_data(run.data, cache_dir, fingerprint))
    n_tokens = run.recipe.n_tokens(run.data.sequence_length)
    with StudyProgress(n_tokens, run.model_name) as progress:
        label = f"{run.configuration} seed {run.seed}"
        return train(run, data, folder, callbacks=(progress.run(label, n_tokens),))


def finetune(
    source: str,
    folder: Path,
    *,
    changes: Mapping[str, Any],
    epochs: float = 3.0,
    seed: int = 0,
    lora_rank: int | None = None,
    device: str | None = None,
    cache_dir: Path = DEFAULT_CACHE_DIR,
) -> FinetunedModel:
    """Fine-tunes the model ``source`` on prompts and completions, in ``folder``; resumes from the last checkpoint.

    Collective: call from every rank.

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        folder: run folder.
        changes: any value by its dotted name; ``data.corpus`` among them.
        epochs: passes over the training split, if ``changes`` set no budget.
        seed: of the order of the data and of dropout.
        lora_rank: trains low-rank changes of this rank; None trains all weights.
        device: as for :func:`train_file`.
        cache_dir: where tokenized corpora are kept and found again.

    Raises:
        InputError: the model, the corpus, a change or the folder cannot be used.
        RunFailedError: training could not continue.
    """
    with on_device(device):
        run, data = main_first(
            lambda: finetuning_run(
                load_pretrained(source),
                cache_dir,
                changes=changes,
                epochs=epochs,
                seed=seed,
                lora_rank=lora_rank,
            )
        )
        n_tokens = run.recipe.n_tokens(run.data.sequence_length)
        with StudyProgress(n_tokens, "finetune") as progress:
            result = train(run, data, folder, callbacks=(progress.run(source, n_tokens),))
    return FinetunedModel(result, Beginning.of(data.tokenizer, run.data.beginning), quantization_of(source))
