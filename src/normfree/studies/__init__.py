"""Studies: named grids of configurations, and what to show of them."""

from normfree import runner

__all__ = ["runner"]
