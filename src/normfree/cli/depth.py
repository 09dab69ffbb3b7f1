"""``normfree depth``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from normfree.cli.console import open_console, print_json, records, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import Compared, Json, Output, command_line
from normfree.cli.shared_options import reads_sequences
from normfree.errors import InputError

_COLUMNS = {
    "model": "{model}",
    "layers": "{n_layer}",
    "loss, nats": "{loss_nats:.3f}",
    "effective depth": "{effective_depth:.2f} ± {effective_depth_standard_error:.2f}",
    "deep half": "{deep_half_share:.1%}",
    "deep layer, nats": "{deep_layer_nats:.4f}",
    "variance grows": "{variance_growth}",
    "last / first": "{variance_ratio:.3g}",
}


@reads_sequences(32)
def depth(
    models: Compared,
    probes: Annotated[int, typer.Option(help="Random vectors a sequence for each Jacobian.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in memory at once.")] = 8,
    out: Output = None,
    json_: Json = False,
    **reading: Any,
) -> None:
    """Which layers of a model do little: variance, skipped layers, angular distance, Jacobians, gradients.

    See docs/models.md for the models it takes, and docs/depth.md for what each number means.

    Example: normfree depth openai-community/gpt2 --corpus file:text.txt --sequence-length 256
    """
    from normfree.interpret import compare_depth

    if len(set(models)) < len(models):
        raise InputError("a model is named twice; name each once")
    folder = output_folder(out, "depth", models)
    console = open_console(json_)
    named = {model_name(source, models): source for source in models}
    found = compare_depth(named, n_probe=probes, batch_size=batch_size, **reading)
    found.write(folder, command_line())
    if json_:
        rows = {
            name: {key: records(frame) for key, frame in measurement.frames().items()}
            for name, measurement in found.models.items()
        }
        read = {"beginning": found.sequences.beginning.summary(), "quantization": found.quantization}
        print_json(folder=str(folder), **read, loaded_as=found.loaded_as, models=rows)
        return
    shown = [
        [form.format_map(row).replace("%", " %") for form in _COLUMNS.values()]
        for row in found.summary.to_dict("records")
    ]
    console.print(table(_COLUMNS, shown, n_left=1))
    say(console, f"Read on {found.sequences}")
    say_origin(console, found.quantization, found.loaded_as)
    for row in found.summary[found.summary["nonfinite_entries"] > 0].to_dict("records"):
        say(console, f"{row['model']}: {row['nonfinite_entries']:,} entries of the residual stream are NaN or infinite")
    say(console, f"Report: {folder / 'report.html'}")
