"""``normfree entropy``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from normfree.cli.console import open_console, print_json, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import Json, Model, Output
from normfree.cli.shared_options import reads_sequences
from normfree.columns import SHARE_OF_UNIFORM, SINK_SHARE, UNIFORM_NATS
from normfree.progress import stage

if TYPE_CHECKING:
    from normfree.measurement import Measurement


@reads_sequences(32)
def entropy(model: Model, out: Output = None, json_: Json = False, **reading: Any) -> None:
    """Measure the attention entropy of every head of a model: a table, a CSV file a head and layer, a heatmap.

    Example: normfree entropy gpt2 --corpus installed-python --sequence-length 256
    """
    from normfree.measurement import measure_on_corpus

    folder, name = output_folder(out, "entropy", [model]), model_name(model, [model])
    console = open_console(json_)
    with stage(f"attention entropy of {name}"):
        result = measure_on_corpus(model, name=name, **reading)
    result.save(folder)
    read = f"{result.n_sequences} sequences of {result.sequence_length} tokens ({result.beginning})"
    if json_:
        origin = {"beginning": result.beginning.summary(), "quantization": result.quantization}
        print_json(folder=str(folder), **origin, loaded_as=result.loaded_as, **result.summary())
        return
    say(
        console,
        f"{name}: attention entropy in nats over {read}; uniform: of uniform attention to the same keys, at most "
        f"{result.uniform_bound:.3f}",
    )
    console.print(_layers_table(result))
    for module, reason in result.unreadable.items():
        say(console, f"not read: {module}: {reason}")
    say_origin(console, {name: result.quantization}, {name: result.loaded_as})
    say(console, f"Files: {folder}")


def _layers_table(result: Measurement) -> Table:
    columns = ("layer", "mean", "min", "max", "uniform", "share of uniform", "sink share", "heads in top band")
    rows = []
    for row in result.layers.to_dict("records"):
        nats = (f"{row[column]:.3f}" for column in ("mean_nats", "min_nats", "max_nats", UNIFORM_NATS))
        shares = (f"{100 * row[column]:.1f} %" for column in (SHARE_OF_UNIFORM, SINK_SHARE))
        rows.append((str(row["layer"]), *nats, *shares, f"{row['top_band_heads']} of {row['n_head']}"))
    return table(columns, rows)
