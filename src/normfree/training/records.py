"""What a run measured over time: two tables in long form that grow on disk, continued after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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

ROWS_IN_MEMORY = 1 << 17
"""Rows of a table that are copied at a time; a row group of the file."""


class RunRecords:
    """The metrics and per-layer measurements of one run.

    ``metrics.parquet`` has a row a (step, name): step and tokens trained on so far, wall-clock seconds of training
    (all sessions of a resumed run together), name, value. ``layers.parquet`` has a row a (step, layer, head, name);
    ``head`` is null for what belongs to the whole layer. Layers and heads count from 0. NaN values are kept. Of several
    processes only the main one writes.

    Raises:
        InputError: a table of the resumed run is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._metrics = _GrowingTable(folder / METRICS_FILE, METRICS_COLUMNS)
        self._layers = _GrowingTable(folder / LAYERS_FILE, LAYERS_COLUMNS)

    def add_metric(self, step: int, tokens: int, wall_seconds: float, name: str, value: float) -> None:
        self._metrics.add(step, tokens, wall_seconds, name, value)

    def add_layer(self, step: int, layer: int, head: int | None, name: str, value: float) -> None:
        self._layers.add(step, layer, head, name, value)

    def metric(self, name: str) -> list[tuple[int, float]]:
        """Step and value of each row of metric ``name`` that is on disk and not dropped, in the order of steps."""
        tables = [rows.filter(pc.field("name") == name) for rows in self._metrics.rows()]
        columns = ([value for rows in tables for value in rows[each].to_pylist()] for each in ("step", "value"))
        return list(zip(*columns, strict=True))

    @property
    def wall_seconds(self) -> float:
        """Seconds of training recorded so far."""
        return max((pc.max(rows["wall_seconds"]).as_py() or 0.0 for rows in self._metrics.rows()), default=0.0)

    def rewind(self, step: int) -> None:
        """Forgets what was measured after the checkpoint of ``step``, which is about to be measured again.

        A checkpoint holds the metrics logged at its own step; the layers at that step are read by the training
        step that follows it.
        """
        self._metrics.forget_after(step)
        self._layers.forget_after(step - 1)

    def flush(self) -> None:
        """Writes both tables, in the main process."""
        self._metrics.flush()
        self._layers.flush()


class _GrowingTable:
    """A Parquet file to which rows are added; in memory are those that were added since it was last written.

    A Parquet file cannot be added to: it is copied, some rows at a time, so that a long run needs no more memory than
    a short one, and takes the old one's place when it is whole.
    """

    def __init__(self, path: Path, columns: dict[str, str]) -> None:
        self._path = path
        self._columns = columns
        # of a row, because an empty column of strings is one of anything to older pandas
        row = tuple("" if kind == "str" else 0 for kind in columns.values())
        self._schema = pa.Schema.from_pandas(self._frame([row]), preserve_index=False)
        self._added: list[tuple[object, ...]] = []
        self._last_step: int | None = None
        for _ in self.rows():  # finds a damaged file before training, not at the next flush
            pass

    def add(self, *row: object) -> None:
        self._added.append(row)

    def forget_after(self, step: int) -> None:
        """Takes away the rows of later steps: now from what is read, with the next flush from the file."""
        self._last_step = step
        self._added.clear()

    def rows(self) -> Iterator[pa.Table]:
        """What was flushed and not forgotten, some rows at a time.

        Raises:
            InputError: the file is damaged.
        """
        if not self._path.exists():
            return
        try:
            with pq.ParquetFile(self._path) as file:
                # Every thread that reads would keep a heap of its own.
                for batch in file.iter_batches(ROWS_IN_MEMORY, use_threads=False):
                    rows = pa.Table.from_batches([batch]).cast(self._schema)
                    yield rows if self._last_step is None else rows.filter(pc.field("step") <= self._last_step)
        except (OSError, ValueError) as error:
            raise _damaged(self._path) from error

    def flush(self) -> None:
        if is_main_process() and (self._added or self._last_step is not None or not self._path.exists()):
            with written_whole(self._path) as temporary, self._writer(temporary) as writer:
                for rows in self.rows():
                    writer.write_table(rows)
                writer.write_table(pa.Table.from_pandas(self._frame(self._added), self._schema))
            # Arrow keeps what it has freed, more of it after each copy.
            pa.default_memory_pool().release_unused()
        self._last_step = None
        self._added.clear()

    def _writer(self, path: Path) -> pq.ParquetWriter:
        # The bytes of a number apart: most values were float32, and their last ones are zero.
        keys = [name for name in self._columns if name != "value"]
        return pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=keys, use_byte_stream_split=["value"]
        )

    def _frame(self, rows: list[tuple[object, ...]]) -> pd.DataFrame:
        return pd.DataFrame(rows, columns=list(self._columns)).astype(self._columns)


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
        raise _damaged(path) from error


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} cannot be read: it is missing or damaged; restore it, or run again elsewhere")
