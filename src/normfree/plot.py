"""The figures of Normfree's reports: each takes DataFrames and returns a matplotlib ``Figure``. ::

    study = normfree.load_study("studies/relu-revival-cpu")
    normfree.plot.headwise_entropy_heatmaps(study.head_entropy)

Each function's docstring names the columns it needs; further columns are ignored. ``model``, ``context_length``,
``configuration`` and ``seed`` name a run, and a diverged run has NaN in its rows. Frames come from
:class:`~normfree.runner.StudyResult` (``head_entropy``, ``layer_entropy``, ``eval_curve``), from
``Measurement.head_entropy``, from the CSV files that the commands write, or from anywhere else.

Figures are made without pyplot: save one with :func:`save_figure` or ``figure.savefig``. A notebook draws a figure that
a cell returns.

All functions raise an InputError that names a missing column, and a row that occurs twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from normfree.report.notebook import draw_figures_in_notebooks

_ROOMS = {
    "interpret.depth.figures": (
        "angular_distance_heatmaps",
        "jacobian_distance_and_gradient_norms",
        "pruned_layer_losses",
        "residual_variance_over_depth",
        "skipped_layer_losses",
    ),
    "interpret.figures": (
        "attribution_error_heatmaps",
        "confidence_neurons",
        "cumulative_ablation",
        "first_token_over_depth",
        "patching_agreement",
        "residual_std_by_position",
    ),
    "report.entropy_figures": (
        "headwise_entropy_distribution",
        "headwise_entropy_heatmaps",
        "layerwise_entropy_dynamics",
    ),
    "report.loss_curves": ("evaluation_loss_curves",),
    "report.overload": ("perplexity_and_overload",),
    "report.prediction_figures": ("loss_by_position", "reliability_diagrams"),
    "report.saving": ("save_figure",),
    "report.signal_curves": ("signal_propagation_dynamics", "signal_propagation_over_depth"),
    "studies.entropy_regularization": ("entropy_threshold_trajectories",),
    "studies.hybrid_activations": ("layer_entropy_by_configuration",),
    "studies.learnable_slopes": ("negative_slope_trajectories",),
    "studies.negative_slope.figures": ("instability_dynamics",),
    "studies.norm_removal.figures": ("removal_loss_curves",),
    "studies.spark.figures": ("active_neurons",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted(_ROOM_OF)

draw_figures_in_notebooks()


def __getattr__(name: str) -> Callable[..., Any]:
    """A figure, imported when it is first used (PEP 562): those of a study import the study."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'normfree.plot' has no attribute {name!r}")
    figure: Callable[..., Any] = getattr(importlib.import_module(f"normfree.{_ROOM_OF[name]}"), name)
    globals()[name] = figure
    return figure


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
