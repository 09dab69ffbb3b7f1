"""``normfree train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Json, checked_folder, open_console


def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, such as the config.yaml of an earlier run.")],
    out: Annotated[Path, typer.Option(help="Run folder.", callback=checked_folder)],
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train one configuration. A stopped run resumes from its last checkpoint.

    The config.yaml of an earlier run also says which tokens it was trained on: the same are used, or the run is
    refused. Without its `provenance` the corpus is taken as it is now.

    Several processes train one run: torchrun --nproc-per-node 8 -m normfree train ... (docs/distributed.md).

    Example: normfree train studies/relu-revival-cpu/runs/sm-r/seed-0/config.yaml --out runs/again
    """
    from normfree.data import prepare_data, same_data
    from normfree.processes import is_main_process, main_first
    from normfree.training import StudyProgress, load_run_config
    from normfree.training import train as train_run
    from normfree.training.run_folder import CONFIG_FILE, recorded

    run = load_run_config(config)
    console = open_console(json_)
    # A run that has begun goes on with its own tokens, and one that is done again has those of the first time.
    fingerprint = recorded(out / CONFIG_FILE, "corpus_fingerprint") or recorded(config, "corpus_fingerprint")
    if fingerprint is None:
        data = main_first(lambda: prepare_data(run.data, cache_dir, progress=console.is_terminal))
    else:
        data = main_first(lambda: same_data(run.data, cache_dir, fingerprint, progress=console.is_terminal))
    n_tokens = run.recipe.n_tokens(run.data.sequence_length)
    label = f"{run.configuration} seed {run.seed}"
    with StudyProgress(n_tokens, console=console, description=run.model_name) as progress:
        result = train_run(run, data, out, callbacks=(progress.run(label, n_tokens),))
    if json_:
        if is_main_process():
            print(json.dumps({"folder": str(out), **result.row}))
        return
    row = result.row
    console.print(
        f"{label}: evaluation loss {row['eval_loss']:.4f} nats per token, perplexity {row['eval_ppl']:.2f} "
        f"({row['status']}); {out}",
        highlight=False,
        soft_wrap=True,
    )
