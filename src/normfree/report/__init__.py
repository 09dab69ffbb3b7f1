"""Tables, figures and a self-contained HTML page from the data frames of a study."""

from normfree.report.depth import (
    angular_distance_heatmaps,
    jacobian_distance_and_gradient_norms,
    residual_variance_over_depth,
    skipped_layer_losses,
)
from normfree.report.depth_tables import DEPTH_SUMMARY, depth_table
from normfree.report.figures import (
    evaluation_loss_curves,
    headwise_entropy_distribution,
    layerwise_entropy_dynamics,
    save_figure,
)
from normfree.report.first_token import first_token_over_depth
from normfree.report.heatmaps import headwise_entropy_heatmaps
from normfree.report.html import (
    Block,
    Callout,
    Code,
    FigureBlock,
    KeyValues,
    Paragraph,
    Section,
    Table,
    render_report,
    weights_entry,
    write_report,
)
from normfree.report.hybrids import layer_entropy_by_configuration
from normfree.report.instability import entropy_collapse, first_nonfinite
from normfree.report.instability_dynamics import instability_dynamics
from normfree.report.interpretability import (
    attribution_error_heatmaps,
    confidence_neurons,
    patching_agreement,
    residual_std_by_position,
)
from normfree.report.outlier_tables import PRECISION_NAMES, outlier_table, quantization_table
from normfree.report.overload import perplexity_and_overload
from normfree.report.pruning import pruned_layer_losses
from normfree.report.published import (
    PUBLISHED_NAMES,
    PublishedName,
    load_published,
    published_head_entropy,
)
from normfree.report.scaling import loss_gap, loss_gap_heatmap
from normfree.report.signal_propagation import (
    SIGNAL_STATISTICS,
    signal_propagation_dynamics,
    signal_propagation_over_depth,
)
from normfree.report.slopes import negative_slope_trajectories, slope_under_decay_only
from normfree.report.spark import active_neurons, sparsity_table
from normfree.report.statistics import (
    BAND_LABELS,
    BANDS,
    Estimate,
    PairedDifference,
    band_shares,
    mean_confidence_interval,
    paired_difference,
)
from normfree.report.style import paper_style
from normfree.report.tables import formatted, perplexity_table, table_notes, to_console, to_markdown
from normfree.report.thresholds import entropy_threshold_trajectories
from normfree.report.trajectories import entropy_trajectory_distance, trajectory_distance_matrix

__all__ = [
    "BANDS",
    "BAND_LABELS",
    "DEPTH_SUMMARY",
    "PRECISION_NAMES",
    "PUBLISHED_NAMES",
    "SIGNAL_STATISTICS",
    "Block",
    "Callout",
    "Code",
    "Estimate",
    "FigureBlock",
    "KeyValues",
    "PairedDifference",
    "Paragraph",
    "PublishedName",
    "Section",
    "Table",
    "active_neurons",
    "angular_distance_heatmaps",
    "attribution_error_heatmaps",
    "band_shares",
    "confidence_neurons",
    "depth_table",
    "entropy_collapse",
    "entropy_threshold_trajectories",
    "entropy_trajectory_distance",
    "evaluation_loss_curves",
    "first_nonfinite",
    "first_token_over_depth",
    "formatted",
    "headwise_entropy_distribution",
    "headwise_entropy_heatmaps",
    "instability_dynamics",
    "jacobian_distance_and_gradient_norms",
    "layer_entropy_by_configuration",
    "layerwise_entropy_dynamics",
    "load_published",
    "loss_gap",
    "loss_gap_heatmap",
    "mean_confidence_interval",
    "negative_slope_trajectories",
    "outlier_table",
    "paired_difference",
    "paper_style",
    "patching_agreement",
    "perplexity_and_overload",
    "perplexity_table",
    "pruned_layer_losses",
    "published_head_entropy",
    "quantization_table",
    "render_report",
    "residual_std_by_position",
    "residual_variance_over_depth",
    "save_figure",
    "signal_propagation_dynamics",
    "signal_propagation_over_depth",
    "skipped_layer_losses",
    "slope_under_decay_only",
    "sparsity_table",
    "table_notes",
    "to_console",
    "to_markdown",
    "trajectory_distance_matrix",
    "weights_entry",
    "write_report",
]
