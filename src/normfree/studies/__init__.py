"""Studies: named grids of configurations, and what to show of them.

A new study is one file with a ``STUDY`` and one line here.
"""

from normfree.studies import relu_revival
from normfree.studies.page import StudyPage
from normfree.studies.preset import Preset, load_preset, preset_names
from normfree.studies.study import Study, StudyFolder, run_study

STUDIES = {study.name: study for study in (relu_revival.STUDY,)}

__all__ = ["STUDIES", "Preset", "Study", "StudyFolder", "StudyPage", "load_preset", "preset_names", "run_study"]
