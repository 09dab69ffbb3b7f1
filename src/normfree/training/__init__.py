"""Training: one loop over a recipe, with telemetry, checkpoints and objectives."""

from normfree.training.callback import Callback, RunState
from normfree.training.loop import Intervention, train
from normfree.training.objectives import OBJECTIVES
from normfree.training.pretrained import LoadedModel, load_pretrained, quantization_of
from normfree.training.progress import StudyProgress
from normfree.training.recipe import Recipe
from normfree.training.result import RunResult, load_result
from normfree.training.run_config import RunConfig, load_run_config

__all__ = [
    "OBJECTIVES",
    "Callback",
    "Intervention",
    "LoadedModel",
    "Recipe",
    "RunConfig",
    "RunResult",
    "RunState",
    "StudyProgress",
    "load_pretrained",
    "load_result",
    "load_run_config",
    "quantization_of",
    "train",
]
