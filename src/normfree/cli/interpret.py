"""``normfree interpret``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli.console import open_console, print_json, records, say, say_origin, table
from normfree.cli.names import model_name, output_folder
from normfree.cli.options import Compared, Json, Output, command_line
from normfree.cli.shared_options import reads_sequences


@reads_sequences(64)
def interpret(
    models: Compared,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with clean, corrupted, answer, wrong_answer; default: induction prompts."),
    ] = None,
    neurons: Annotated[int, typer.Option(help="Candidate confidence neurons to ablate.")] = 20,
    out: Output = None,
    json_: Json = False,
    **reading: Any,
) -> None:
    """Direct logit attribution, patching, confidence neurons and sinks, of models with and without norms.

    Example: normfree interpret removal/vanilla removal/norm-free --corpus installed-python
    """
    from normfree.interpret import compare_interpretability

    folder = output_folder(out, "interpretation", models)
    console = open_console(json_)
    named = {model_name(each, models): each for each in models}
    found = compare_interpretability(named, prompts=prompts, n_neuron=neurons, **reading)
    found.write(folder, command_line())
    if json_:
        read = {"beginning": found.sequences.beginning.summary(), "quantization": found.quantization}
        print_json(folder=str(folder), **read, loaded_as=found.loaded_as, summary=records(found.summary))
        return
    columns = [str(column).replace("_", " ") for column in found.summary.columns]
    rows = [
        [value if isinstance(value, str) else f"{value:.3f}" for value in row.values()]
        for row in found.summary.to_dict("records")
    ]
    console.print(table(columns, rows, n_left=1))
    say(console, f"Read on {found.sequences}")
    say_origin(console, found.quantization, found.loaded_as)
    say(console, f"Report: {folder / 'report.html'}")
