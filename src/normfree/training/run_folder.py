"""What marks a run folder as finished, and where its trained weights are."""

from __future__ import annotations

from pathlib import Path

RESULTS_FILE = "results.csv"
"""Written last: its presence says that the run is finished."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written whole, if there is one."""
    # The Trainer writes its own state after everything else.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
