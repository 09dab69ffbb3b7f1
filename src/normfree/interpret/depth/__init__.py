"""How a decoder uses its depth: diagnostics of layers that do little (Sun et al., "The Curse of Depth", 2025)."""

from normfree.interpret.depth.angular_distance import most_similar_block
from normfree.interpret.depth.comparison import DepthComparison, compare_depth
from normfree.interpret.depth.effective_depth import EffectiveDepth, effective_depth
from normfree.interpret.depth.growth import fit_growth
from normfree.interpret.depth.measurement import (
    DepthMeasurement,
    measure_angular_distance,
    measure_depth,
    write_depth,
)

__all__ = [
    "DepthComparison",
    "DepthMeasurement",
    "EffectiveDepth",
    "compare_depth",
    "effective_depth",
    "fit_growth",
    "measure_angular_distance",
    "measure_depth",
    "most_similar_block",
    "write_depth",
]
