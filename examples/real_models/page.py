"""docs/real-models.md, from a template and the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from . import measure
from .claims import CLAIMS
from .measured import Measured
from .packages import GEMMA3, SMOLLM2

TEMPLATE = "page.md.j2"
DROPPED = "dropped"


def render_page(results: Path) -> str:
    """The page, from the CSV files of ``results`` alone."""
    smollm2 = Measured(SMOLLM2, results, has_inner_norms=False)
    gemma3 = Measured(GEMMA3, results, has_inner_norms=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    commands = pd.read_csv(results / "commands.csv", keep_default_na=False)
    return environment.get_template(TEMPLATE).render(
        about=json.loads((results / "about.json").read_text(encoding="utf-8")),
        commands={name: rows["line"].tolist() for name, rows in commands.groupby("command", sort=False)},
        measure=measure,
        models=(smollm2, gemma3),
        smollm2=smollm2,
        gemma3=gemma3,
        no_bos=f"{GEMMA3.name}, {measure.NO_BOS}",
        claims=[(claim, [claim.check(model) for model in (smollm2, gemma3)]) for claim in CLAIMS],
        pruned=_pruned(smollm2, gemma3),
        int8=_int8(smollm2, gemma3),
    )


def _pruned(*models: Measured) -> list[dict[str, Any]]:
    """A row a model and order: the increase of the loss by number of layers dropped, and which they are at most."""
    rows = []
    for model in models:
        for order, each in model.rows("pruned").groupby("order", sort=False):
            increases = {row["n_dropped"]: row for row in each.to_dict("records")}
            rows.append({"model": model.model.name, "order": order, DROPPED: increases})
    return rows


def _int8(*models: Measured) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        of_model = model.rows("int8").set_index("precision")
        rows.append({"model": model, "loss": of_model["eval_loss"], "percent": of_model["increase_percent"]})
    return rows
