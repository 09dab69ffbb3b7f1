"""The machinery of studies: what a study is, how its runs are trained, and how its report is written.

Studies import from here only. The machinery imports no study: it finds them (see :mod:`normfree.runner.catalog`).
"""

from normfree.runner.catalog import Found, find_study, installed_studies
from normfree.runner.driver import failure_summary, help_with
from normfree.runner.execution import DEFAULT_RETRIES, Execution
from normfree.runner.executors import EXECUTORS, make_executor
from normfree.runner.keeping import keep_tables
from normfree.runner.listing import list_presets, list_studies
from normfree.runner.opening import OpenCollection, OpenStudy, begin, open_folder
from normfree.runner.page import COMPARABLE, Findings, StudyPage
from normfree.runner.presets import Preset, RemovalOptions, load_preset, preset_names
from normfree.runner.result import StudyResult, load_study, run_study
from normfree.runner.run_frames import (
    KEY,
    eval_curve_frame,
    final_checkpoint,
    head_entropy_frame,
    layer_entropy_frame,
    measured_frame,
    run_key,
    telemetry_frame,
)
from normfree.runner.study import Collection, Configuration, Measurement, Member, Study, run_config, slug
from normfree.runner.study_folder import StudyFolder

__all__ = [
    "COMPARABLE",
    "DEFAULT_RETRIES",
    "EXECUTORS",
    "KEY",
    "Collection",
    "Configuration",
    "Execution",
    "Findings",
    "Found",
    "Measurement",
    "Member",
    "OpenCollection",
    "OpenStudy",
    "Preset",
    "RemovalOptions",
    "Study",
    "StudyFolder",
    "StudyPage",
    "StudyResult",
    "begin",
    "eval_curve_frame",
    "failure_summary",
    "final_checkpoint",
    "find_study",
    "head_entropy_frame",
    "help_with",
    "installed_studies",
    "keep_tables",
    "layer_entropy_frame",
    "list_presets",
    "list_studies",
    "load_preset",
    "load_study",
    "make_executor",
    "measured_frame",
    "open_folder",
    "preset_names",
    "run_config",
    "run_key",
    "run_study",
    "slug",
    "telemetry_frame",
]
