"""How a decoder uses its depth: diagnostics of layers that do little (Sun et al., "The Curse of Depth", 2025)."""

from normfree.interpret.depth.angular_distance import most_similar_block as most_similar_block
from normfree.interpret.depth.comparison import DepthComparison as DepthComparison
from normfree.interpret.depth.comparison import compare_depth as compare_depth
from normfree.interpret.depth.effective_depth import EffectiveDepth as EffectiveDepth
from normfree.interpret.depth.effective_depth import effective_depth as effective_depth
from normfree.interpret.depth.growth import fit_growth as fit_growth
from normfree.interpret.depth.measurement import DepthMeasurement as DepthMeasurement
from normfree.interpret.depth.measurement import measure_angular_distance as measure_angular_distance
from normfree.interpret.depth.measurement import measure_depth as measure_depth
from normfree.interpret.depth.measurement import write_depth as write_depth
