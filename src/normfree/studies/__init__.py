"""Studies: named grids of configurations, and what to show of them."""

from normfree.studies.preset import Preset, load_preset, preset_names
from normfree.studies.study import Study, StudyFolder, run_study

__all__ = ["Preset", "Study", "StudyFolder", "load_preset", "preset_names", "run_study"]
