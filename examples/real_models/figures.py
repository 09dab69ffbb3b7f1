"""The page's figures, from the results alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from normfree.files import written_whole
from normfree.plot import (
    angular_distance_heatmaps,
    first_token_over_depth,
    headwise_entropy_heatmaps,
    pruned_layer_losses,
    residual_variance_over_depth,
    skipped_layer_losses,
)
from normfree.report import paper_style

DPI = 150


def write_figures(results: Path, folder: Path) -> None:
    """Writes ``real-models-*.png`` into ``folder``."""
    heads = _read(results, "heads")
    runs = {name: _of_runs(results, name) for name in DEPTH_FRAMES}
    figures = {
        "entropy": headwise_entropy_heatmaps(
            heads.assign(configuration=heads["model"], model="", context_length=0, seed=0),
            maximum=heads["uniform_nats"].max(),
            annotate=False,
        ),
        "first-token": first_token_over_depth(_read(results, "residual_stds"), heads),
        "variance": residual_variance_over_depth(runs["residual_variance"], runs["variance_growth"]),
        "skipped": skipped_layer_losses(runs["skipped_layers"], runs["dropped_last"]),
        "angular": angular_distance_heatmaps(runs["angular_distance"]),
        "pruned": pruned_layer_losses(_read(results, "pruned")),
    }
    for name, figure in figures.items():
        _save(figure, folder / f"real-models-{name}.png")


DEPTH_FRAMES = ("residual_variance", "variance_growth", "skipped_layers", "dropped_last", "angular_distance")


def _read(results: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(results / f"{name}.csv")


def _of_runs(results: Path, name: str) -> pd.DataFrame:
    frame = _read(results, name)
    return frame.rename(columns={"model": "configuration"}).assign(seed=0)


def _save(figure: Figure, path: Path) -> None:
    with paper_style(), written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
