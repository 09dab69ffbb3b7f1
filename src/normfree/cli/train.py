"""``normfree train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normfree.cli.console import open_console, print_json, say
from normfree.cli.options import DEFAULT_CACHE_DIR, CacheDir, Device, Json, RunFolder


def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, such as the config.yaml of an earlier run.")],
    out: RunFolder,
    device: Device = None,
    cache_dir: CacheDir = DEFAULT_CACHE_DIR,
    json_: Json = False,
) -> None:
    """Train one configuration. A stopped run resumes from its last checkpoint.

    The config.yaml of an earlier run also says which tokens it was trained on: the same are used, or the run is
    refused. Without its `provenance` the corpus is taken as it is now.

    Several processes train one run: torchrun --nproc-per-node 8 -m normfree train ... (docs/distributed.md).

    Example: normfree train studies/relu-revival-cpu/runs/sm-r/seed-0/config.yaml --out runs/again
    """
    from normfree.training.single_run import train_file

    console = open_console(json_)
    row = train_file(config, out, device=device, cache_dir=cache_dir).row
    if json_:
        print_json(folder=str(out), **row)
        return
    say(
        console,
        f"{row['configuration']} seed {row['seed']}: evaluation loss {row['eval_loss']:.4f} nats per token, perplexity "
        f"{row['eval_ppl']:.2f} ({row['status']}); {out}",
    )
