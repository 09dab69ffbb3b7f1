"""What a run measured over time: two tables in long form, written atomically, continued after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from normfree.errors import InputError
from normfree.files import written_whole
from normfree.processes import is_main_process

METRICS_FILE = "metrics.parquet"
LAYERS_FILE = "layers.parquet"

METRICS_COLUMNS = {
    "step": "int64",
    "tokens": "int64",
    "wall_seconds": "float64",
    "name": "str",
    "value": "float64",
}
LAYERS_COLUMNS = {"step": "int64", "layer": "int64", "head": "Int64", "name": "str", "value": "float64"}


class RunRecords:
    """The metrics and per-layer measurements of one run.

    ``metrics.parquet`` has a row a (step, name): step and tokens trained on so far, wall-clock seconds of training
    (all sessions of a resumed run together), name, value. ``layers.parquet`` has a row a (step, layer, head, name);
    ``head`` is null for what belongs to the whole layer. Layers and heads count from 0. NaN values are kept. Of several
    processes only the main one writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = _read(folder / METRICS_FILE, METRICS_COLUMNS)
        self._layers = _read(folder / LAYERS_FILE, LAYERS_COLUMNS)
        self._new_metrics: list[tuple[int, int, float, str, float]] = []
        self._new_layers: list[tuple[int, int, int | None, str, float]] = []

    def add_metric(self, step: int, tokens: int, wall_seconds: float, name: str, value: float) -> None:
        self._new_metrics.append((step, tokens, wall_seconds, name, value))

    def add_layer(self, step: int, layer: int, head: int | None, name: str, value: float) -> None:
        self._new_layers.append((step, layer, head, name, value))

    @property
    def wall_seconds(self) -> float:
        """Seconds of training recorded so far."""
        return float(self._metrics["wall_seconds"].max()) if len(self._metrics) else 0.0

    def rewind(self, step: int) -> None:
        """Forgets what was measured after the checkpoint of ``step``, which is about to be measured again.

        A checkpoint holds the metrics logged at its own step; the layers at that step are read by the training
        step that follows it.
        """
        self._metrics = self._metrics[self._metrics["step"] <= step]
        self._layers = self._layers[self._layers["step"] < step]
        self._new_metrics.clear()
        self._new_layers.clear()

    def flush(self) -> None:
        """Writes both tables, in the main process."""
        self._metrics = _extended(self._metrics, self._new_metrics, METRICS_COLUMNS)
        self._layers = _extended(self._layers, self._new_layers, LAYERS_COLUMNS)
        self._new_metrics.clear()
        self._new_layers.clear()
        if is_main_process():
            write_parquet(self._metrics, self.folder / METRICS_FILE)
            write_parquet(self._layers, self.folder / LAYERS_FILE)


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Writes ``table`` whole or not at all."""
    with written_whole(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_parquet(path: Path) -> pd.DataFrame:
    """The table in ``path``.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file is a ValueError
        raise InputError(
            f"{path} cannot be read: it is missing or damaged; restore it, or run again elsewhere"
        ) from error


def _read(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    if path.exists():
        return read_parquet(path).astype(columns)
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in columns.items()})


def _extended(table: pd.DataFrame, rows: Sequence[tuple[object, ...]], columns: dict[str, str]) -> pd.DataFrame:
    if not rows:
        return table
    added = pd.DataFrame(rows, columns=list(columns)).astype(columns)
    return added if table.empty else pd.concat([table, added], ignore_index=True)
