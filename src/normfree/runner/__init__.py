"""The machinery of studies: what a study is, how its runs are trained, and how its report is written."""

from normfree.runner.catalog import Found, find_study, installed_studies
from normfree.runner.collection import Collection, CollectionFolder
from normfree.runner.execution import DEFAULT_RETRIES, Execution, help_with, told
from normfree.runner.executors import EXECUTORS, make_executor
from normfree.runner.listing import list_presets, list_studies
from normfree.runner.opening import begin, open_folder
from normfree.runner.page import Findings, StudyPage
from normfree.runner.presets import Preset, load_preset, preset_names
from normfree.runner.result import StudyResult, load_study, run_study
from normfree.runner.study import Configuration, Measurement, Study, StudyFolder, run_config

__all__ = [
    "DEFAULT_RETRIES",
    "EXECUTORS",
    "Collection",
    "CollectionFolder",
    "Configuration",
    "Execution",
    "Findings",
    "Found",
    "Measurement",
    "Preset",
    "Study",
    "StudyFolder",
    "StudyPage",
    "StudyResult",
    "begin",
    "find_study",
    "help_with",
    "installed_studies",
    "list_presets",
    "list_studies",
    "load_preset",
    "load_study",
    "make_executor",
    "open_folder",
    "preset_names",
    "run_config",
    "run_study",
    "told",
]
