"""Evaluate a trained run, or any causal language model, on tasks of EleutherAI's evaluation harness, lm-eval.

    python examples/downstream.py studies/relu-revival-cpu/runs/sm-ln-r/seed-0
    python examples/downstream.py openai-community/gpt2 --batch-size 8

The default task is examples/lm_eval/python_syntax.yaml, whose data are local.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import PreTrainedTokenizerBase

from normfree.errors import InputError
from normfree.interpret import tokenizer_of
from normfree.training import LoadedModel, load_pretrained

TASKS = Path(__file__).parent / "lm_eval"


def evaluate(
    measured: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    include_path: Path = TASKS,
    batch_size: int = 1,
) -> dict[str, Any]:
    """lm-eval's results: ``results`` by task, and ``samples``, every answer with its log-likelihoods in nats."""
    manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        # only now: reading the thousands of task files that lm-eval brings takes longer than evaluating on ours
        manager = TaskManager(include_path=str(include_path))
    model = HFLM(pretrained=measured.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    results: dict[str, Any] = simple_evaluate(model, tasks=tasks, task_manager=manager)
    return results


def count_nan(samples: dict[str, list[dict[str, Any]]]) -> int:
    """How many log-likelihoods are NaN. lm-eval says nothing of them and takes a choice with one for the likeliest."""
    responses: Iterable[Any] = (
        response for each in samples.values() for sample in each for request in sample["resps"] for response in request
    )
    return sum(isinstance(response, tuple) and math.isnan(response[0]) for response in responses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run or checkpoint folder, a folder of transformers' form, or a Hub id")
    parser.add_argument("--tasks", default="python_syntax", help="comma-separated names")
    parser.add_argument("--include-path", type=Path, default=TASKS, help="folder with task files of your own")
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    try:
        measured = load_pretrained(options.model)
        tokenizer = tokenizer_of(measured)
    except InputError as error:
        parser.error(str(error))
    results = evaluate(
        measured,
        tokenizer,
        options.tasks.split(","),
        include_path=options.include_path,
        batch_size=options.batch_size,
    )
    print(make_table(results))
    if n_nan := count_nan(results["samples"]):
        print(f"{n_nan} log-likelihoods are NaN; lm-eval counts NaN as the most likely: do not use these scores")


if __name__ == "__main__":
    main()
