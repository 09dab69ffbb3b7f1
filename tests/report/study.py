"""Small made-up frames of a study with four configurations, with values a test can follow by hand."""

from typing import Any

import numpy as np
import pandas as pd

CONFIGURATIONS = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")
SETTING: dict[str, Any] = {"model": "tiny", "context_length": 128}


def head_entropy(
    n_layer: int = 6, n_head: int = 4, seeds: tuple[int, ...] = (0,), nan_run: tuple[str, int] | None = None
) -> pd.DataFrame:
    """Entropies drawn from (0.1, 3.8) nats; all of ``nan_run`` (configuration, seed) is NaN."""
    draw = np.random.default_rng(7)
    return pd.DataFrame(
        [
            {
                **SETTING,
                "configuration": configuration,
                "seed": seed,
                "layer": layer,
                "head": head,
                "entropy_nats": float("nan") if (configuration, seed) == nan_run else draw.uniform(0.1, 3.8),
            }
            for configuration in CONFIGURATIONS
            for seed in seeds
            for layer in range(n_layer)
            for head in range(n_head)
        ]
    )


def sequence_losses(seeds: tuple[int, ...] = (0,), nan_run: tuple[str, int] | None = None) -> pd.DataFrame:
    """Fifty sequences each; losses of a configuration are shifted by 0, -0.1, 0.9 and 0.2 nats plus noise."""
    draw = np.random.default_rng(11)
    common = draw.normal(4.0, 0.4, 50)
    rows = []
    for configuration, shift in zip(CONFIGURATIONS, (0.0, -0.1, 0.9, 0.2), strict=True):
        for seed in seeds:
            losses = common + shift + draw.normal(0, 0.05, 50) + draw.normal(0, 0.02)
            if (configuration, seed) == nan_run:
                losses[:] = np.nan
            rows += [
                {"configuration": configuration, "seed": seed, "sequence": i, "loss_nats": loss}
                for i, loss in enumerate(losses)
            ]
    return pd.DataFrame(rows)


def results(losses: pd.DataFrame) -> pd.DataFrame:
    """The results frame that belongs to ``losses``; a run with NaN loss has diverged."""
    means = losses.groupby(["configuration", "seed"], sort=False)["loss_nats"].apply(lambda x: np.mean(x.to_numpy()))
    frame = means.rename("eval_loss").reset_index().assign(**SETTING)
    status = np.where(frame["eval_loss"].isna(), "diverged", "finished")
    return frame.assign(eval_ppl=np.exp(frame["eval_loss"]), status=status)


def eval_curve(seeds: tuple[int, ...] = (0,), diverges: tuple[str, int] | None = None) -> pd.DataFrame:
    """Thirteen evaluations, 9 nats at first; the run ``diverges`` is at 30 nats at step 400 and NaN from 500 on."""
    rows = []
    for configuration, end in zip(CONFIGURATIONS, (4.1, 4.0, 5.0, 4.3), strict=True):
        for seed in seeds:
            for step in range(0, 1300, 100):
                loss = end + (9.0 - end) * np.exp(-step / 200) + 0.01 * seed
                if (configuration, seed) == diverges and step >= 400:
                    loss = 30.0 if step == 400 else float("nan")
                rows.append(
                    {**SETTING, "configuration": configuration, "seed": seed, "step": step}
                    | {"tokens": step * 4096, "eval_loss": loss}
                )
    return pd.DataFrame(rows)


def layer_entropy(
    n_layer: int = 6, seeds: tuple[int, ...] = (0,), diverges: tuple[str, int] | None = None
) -> pd.DataFrame:
    """Twenty steps; layer l falls from 3.8 towards 1 + 0.3 l nats; the run ``diverges`` is NaN from step 100 on."""
    return pd.DataFrame(
        [
            {
                **SETTING,
                "configuration": configuration,
                "seed": seed,
                "step": step,
                "layer": layer,
                "entropy_nats": float("nan")
                if (configuration, seed) == diverges and step >= 100
                else 1 + 0.3 * layer + (2.8 - 0.3 * layer) * np.exp(-step / 60) + 0.01 * seed,
            }
            for configuration in CONFIGURATIONS
            for seed in seeds
            for step in range(0, 200, 10)
            for layer in range(n_layer)
        ]
    )
