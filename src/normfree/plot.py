"""The figures of Normfree's reports: each takes DataFrames and returns a matplotlib ``Figure``. ::

    study = normfree.load_study("studies/relu-revival-cpu")
    normfree.plot.headwise_entropy_heatmaps(study.head_entropy)

Each function's docstring names the columns it needs; more columns do no harm. ``model``, ``context_length``,
``configuration`` and ``seed`` name a run, and a diverged run has NaN in its rows. Frames come from
:class:`~normfree.runner.StudyResult` (``head_entropy``, ``layer_entropy``, ``eval_curve``), from
``Measurement.head_entropy``, from the CSV files that the commands write, or from anywhere else.

Figures are made without pyplot: save one with :func:`save_figure` or ``figure.savefig``. A notebook draws a figure that
a cell returns.

All functions raise an InputError that names a missing column, and a row that occurs twice.
"""

from normfree.report.depth import (
    angular_distance_heatmaps,
    jacobian_distance_and_gradient_norms,
    residual_variance_over_depth,
    skipped_layer_losses,
)
from normfree.report.figures import (
    evaluation_loss_curves,
    headwise_entropy_distribution,
    layerwise_entropy_dynamics,
    save_figure,
)
from normfree.report.first_token import first_token_over_depth
from normfree.report.heatmaps import headwise_entropy_heatmaps
from normfree.report.hybrids import layer_entropy_by_configuration
from normfree.report.instability_dynamics import instability_dynamics
from normfree.report.interpretability import (
    attribution_error_heatmaps,
    confidence_neurons,
    patching_agreement,
    residual_std_by_position,
)
from normfree.report.norm_removal_figures import removal_loss_curves
from normfree.report.notebook import draw_figures_in_notebooks
from normfree.report.overload import perplexity_and_overload
from normfree.report.pruning import pruned_layer_losses
from normfree.report.signal_propagation import signal_propagation_dynamics, signal_propagation_over_depth
from normfree.report.slopes import negative_slope_trajectories
from normfree.report.spark import active_neurons
from normfree.report.thresholds import entropy_threshold_trajectories

draw_figures_in_notebooks()

__all__ = [
    "active_neurons",
    "angular_distance_heatmaps",
    "attribution_error_heatmaps",
    "confidence_neurons",
    "entropy_threshold_trajectories",
    "evaluation_loss_curves",
    "first_token_over_depth",
    "headwise_entropy_distribution",
    "headwise_entropy_heatmaps",
    "instability_dynamics",
    "jacobian_distance_and_gradient_norms",
    "layer_entropy_by_configuration",
    "layerwise_entropy_dynamics",
    "negative_slope_trajectories",
    "patching_agreement",
    "perplexity_and_overload",
    "pruned_layer_losses",
    "removal_loss_curves",
    "residual_std_by_position",
    "residual_variance_over_depth",
    "save_figure",
    "signal_propagation_dynamics",
    "signal_propagation_over_depth",
    "skipped_layer_losses",
]
