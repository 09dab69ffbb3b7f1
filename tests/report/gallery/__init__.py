"""Every figure of every study and command, from made-up frames of models with few layers and with many.

``python -m tests.report.gallery FOLDER [NAME ...]`` draws them, to be looked at.
"""

from . import depth, entropy, interpretability, removal, training
from .frames import DEPTHS
from .registry import FIGURES

__all__ = ["DEPTHS", "FIGURES", "depth", "entropy", "interpretability", "removal", "training"]
