"""Studies: named grids of configurations, and what to show of them."""

from normfree.runner.collection import Collection, CollectionFolder
from normfree.runner.execution import DEFAULT_RETRIES, Execution, help_with, told
from normfree.runner.executors import EXECUTORS, make_executor
from normfree.runner.listing import list_presets, list_studies
from normfree.runner.page import StudyPage
from normfree.runner.presets import Preset, load_preset, preset_names
from normfree.runner.registry import COLLECTIONS, STUDIES, begin, open_folder
from normfree.runner.result import StudyResult, load_study, run_study
from normfree.runner.study import Study, StudyFolder

__all__ = [
    "COLLECTIONS",
    "DEFAULT_RETRIES",
    "EXECUTORS",
    "STUDIES",
    "Collection",
    "CollectionFolder",
    "Execution",
    "Preset",
    "Study",
    "StudyFolder",
    "StudyPage",
    "StudyResult",
    "begin",
    "help_with",
    "list_presets",
    "list_studies",
    "load_preset",
    "load_study",
    "make_executor",
    "open_folder",
    "preset_names",
    "run_study",
    "told",
]
