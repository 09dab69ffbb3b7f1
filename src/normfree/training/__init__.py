"""Training: a recipe on transformers' Trainer, with telemetry beside it."""

from normfree.training.configuration import RunConfig, load_run_config
from normfree.training.objectives import OBJECTIVES
from normfree.training.pretrained import LoadedModel, load_pretrained, quantization_of
from normfree.training.progress import StudyProgress
from normfree.training.recipe import Recipe
from normfree.training.trainer import RunResult, load_result, train

__all__ = [
    "OBJECTIVES",
    "LoadedModel",
    "Recipe",
    "RunConfig",
    "RunResult",
    "StudyProgress",
    "load_pretrained",
    "load_result",
    "load_run_config",
    "quantization_of",
    "train",
]
