"""Studies: named grids of configurations, and what to show of them."""

from normfree.studies.collection import Collection, CollectionFolder
from normfree.studies.page import StudyPage
from normfree.studies.preset import Preset, load_preset, preset_names
from normfree.studies.registry import COLLECTIONS, STUDIES, begin, open_folder
from normfree.studies.study import Study, StudyFolder, run_study

__all__ = [
    "COLLECTIONS",
    "STUDIES",
    "Collection",
    "CollectionFolder",
    "Preset",
    "Study",
    "StudyFolder",
    "StudyPage",
    "begin",
    "load_preset",
    "open_folder",
    "preset_names",
    "run_study",
]
