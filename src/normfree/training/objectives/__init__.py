"""Training objectives other than plain cross-entropy.

A new one is a file with its :class:`Objective` and :class:`ObjectiveOptions`, and one line here.
"""

from normfree.training.objectives.distillation import Distillation, DistillationOptions
from normfree.training.objectives.entropy_regularization import EntropyRegularization, EntropyRegularizationOptions
from normfree.training.objectives.objective import (
    CROSS_ENTROPY,
    DIVERGENCE,
    Lesson,
    Objective,
    ObjectiveOptions,
    Term,
)

OBJECTIVES: dict[str, type[ObjectiveOptions]] = {
    "entropy_regularization": EntropyRegularizationOptions,
    "distillation": DistillationOptions,
}
"""The options of each objective, by the ``kind`` that names it in a configuration."""

__all__ = [
    "CROSS_ENTROPY",
    "DIVERGENCE",
    "OBJECTIVES",
    "Distillation",
    "DistillationOptions",
    "EntropyRegularization",
    "EntropyRegularizationOptions",
    "Lesson",
    "Objective",
    "ObjectiveOptions",
    "Term",
]
