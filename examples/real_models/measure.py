"""What is measured on the two models: commands as a reader would type them, and what no command has.

The commands run in one folder, which holds the models' files, the corpus and what the commands write. What the page is
made of is kept as CSV files: text, tables and figures are made from these alone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from normfree.errors import RunFailedError
from normfree.files import written_whole
from normfree.interpret import (
    check_quantization,
    most_similar_block,
    quantization_cost,
    residual_std_by_position,
    token_sequences,
)
from normfree.interpret.depth.block_calls import record
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.probes.residual_stream import ResidualStreamProbe
from normfree.training import LoadedModel, load_pretrained
from normfree.training.evaluation import evaluation_losses, sequence_losses

from .corpus import write_corpus
from .packages import MODELS, RealModel

CORPUS = "python-source"
T_ENTROPY, N_ENTROPY, N_STREAM = 256, 16, 4
"""The last: of loss with and without a beginning, residual stream and outliers."""
T, N, N_PROBE = 128, 4, 2
"""Of everything else; so many sequences again, others, to measure pruned models on."""
T_INTERPRET, N_NEURON = 48, 5
"""Patching runs the model once a head."""
ORDERS = ("least loss when skipped alone", "smallest angular distance", "the last layers")
N_DROPPED = (1, 2, 4, 8)
NO_BOS = "no bos"


@dataclass(frozen=True)
class Command:
    """A command that is measured with. ``out`` is where its results go, ``label`` what the page calls the run."""

    name: str
    model: RealModel
    label: str
    out: str
    options: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return [self.name, self.model.file, "--corpus", f"directory:{CORPUS}", *self.options, "--out", self.out]

    def __str__(self) -> str:
        return shlex.join(["normfree", *self.arguments])


def commands() -> Iterator[Command]:
    """All of them, in the order of the page."""
    of_entropy = ("--sequence-length", str(T_ENTROPY), "--sequences", str(N_ENTROPY))
    of_others = ("--sequence-length", str(T), "--sequences", str(N))
    for model in MODELS:
        yield Command("entropy", model, model.name, f"entropy/{model.name}", of_entropy)
        if model.has_beginning:
            label = f"{model.name}, {NO_BOS}"
            yield Command("entropy", model, label, f"entropy/{model.name}-no-bos", (*of_entropy, "--no-bos"))
    for model in MODELS:
        probes = ("--probes", str(N_PROBE), "--batch-size", "2")
        yield Command("depth", model, model.name, f"depth/{model.name}", (*of_others, *probes))
    of_interpret = ("--sequence-length", str(T_INTERPRET), "--sequences", str(N), "--neurons", str(N_NEURON))
    for model in MODELS:
        yield Command("interpret", model, model.name, f"interpret/{model.name}", of_interpret)


def measure_all(work: Path, results: Path) -> None:
    """Measures everything in ``work`` and writes CSV files to ``results``."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(work / CORPUS)
    for model in MODELS:
        _link(work / model.file, model.path(work / "joined"))
    runs = [
        {"command": command.name, "label": command.label, "line": str(command), **_run(command, work)}
        for command in commands()
    ]
    write_csv(pd.DataFrame(runs), results / "commands.csv")
    collect(work, results)
    _measure_models(work, results, corpus)


def collect(work: Path, results: Path) -> None:
    """Puts the tables that the commands wrote together, a column ``model`` before the others."""
    tables = {
        "entropy": {"heads": "heads", "layers": "entropy_layers"},
        "depth": {
            name: name
            for name in ("summary", "residual_variance", "variance_growth", "angular_distance", "skipped_layers")
        },
        "interpret": {"summary": "interpretation"},
    }
    tables["depth"] |= {name: name for name in ("dropped_last", "jacobian_distance", "gradient_norms")}
    for name, files in tables.items():
        chosen = [command for command in commands() if command.name == name]
        for file, kept in files.items():
            found = {each.label: work / each.out / f"{file}.csv" for each in chosen}
            frames = [_named(pd.read_csv(path), label) for label, path in found.items() if path.is_file()]
            if frames:
                write_csv(pd.concat(frames, ignore_index=True), results / f"{kept}.csv")


def _named(frame: pd.DataFrame, label: str) -> pd.DataFrame:
    columns = [column for column in frame.columns if column not in ("model", "configuration", "seed", "module")]
    return frame[columns].assign(model=label)[["model", *columns]]


def _run(command: Command, work: Path) -> dict[str, object]:
    """Runs one command. A refusal is a result: exit code 2, and what was said."""
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "normfree", *command.arguments], cwd=work, capture_output=True, text=True, check=False
    )
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode not in (0, 2):
        raise RunFailedError(f"{command} failed: {said}")
    return {"exit_code": done.returncode, "refusal": said if done.returncode else ""}


def _measure_models(work: Path, results: Path, corpus: str) -> None:
    tables: dict[str, list[pd.DataFrame]] = {}
    for model in MODELS:
        print(f"{model.name}: first token, outliers, layers skipped, int8", flush=True)
        loaded = load_pretrained(str(work / model.file))
        for measured in (measure_streams(loaded, model, work), measure_changes(loaded, model, work, results)):
            for name, frame in measured.items():
                tables.setdefault(name, []).append(frame)
    for name, frames in tables.items():
        write_csv(pd.concat(frames, ignore_index=True), results / f"{name}.csv")
    about = {"corpus_sha256": corpus, "python": sys.version.split()[0], "torch": torch.__version__}
    with written_whole(results / "about.json") as path:
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def measure_streams(loaded: LoadedModel, model: RealModel, work: Path) -> dict[str, pd.DataFrame]:
    """Loss, residual stds and outliers; of a model whose tokenizer puts a token first, without it too."""
    losses, stds, outliers = [], [], []
    for bos in (None, False) if model.has_beginning else (None,):
        label = model.name if bos is None else f"{model.name}, {NO_BOS}"
        tokens = _sequences(loaded, work, T_ENTROPY, N_STREAM, bos)
        by_position = residual_std_by_position(loaded.model, tokens, 2)
        stds.append(_first_and_others(by_position).assign(model=label))
        with ResidualStreamProbe(loaded.model) as probe:
            each = evaluation_losses(loaded.model, tokens, 2)
        losses.append(pd.DataFrame([{"model": label, "loss_nats": each.mean(), "standard_error": _error(each)}]))
        outliers.append(_outliers(probe).assign(model=label))
    found = {"losses": losses, "residual_stds": stds, "outliers": outliers}
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items()}


def measure_changes(loaded: LoadedModel, model: RealModel, work: Path, results: Path) -> dict[str, pd.DataFrame]:
    """Open gates, the loss without layers, and that in int8, on other sequences than those of ``depth``."""
    check_quantization(torch.device("cpu"))
    tokens = _sequences(loaded, work, T, 2 * N, None)[N:]
    found = {
        "open_gates": _open_gates(loaded.model, tokens),
        "pruned": _pruned(loaded.model, model, tokens, results),
        "int8": quantization_cost(loaded.model, tokens, 2),
    }
    return {name: frame.assign(model=model.name) for name, frame in found.items()}


def _sequences(loaded: LoadedModel, work: Path, length: int, n: int, bos: bool | None) -> torch.Tensor:
    return token_sequences(
        loaded,
        corpus=f"directory:{work / CORPUS}",
        tokenizer=None,
        sequence_length=length,
        n_sequences=n,
        cache_dir=work / "cache",
        bos=bos,
    ).tokens


def _first_and_others(stds: pd.DataFrame) -> pd.DataFrame:
    """By layer: the std of the first token, and the median, least and largest of the other positions."""
    table = stds.pivot(index="layer", columns="position", values="residual_std").sort_index(axis=1)
    first, others = table.iloc[:, 0], table.iloc[:, 1:]
    columns = {
        "others_median": others.median(axis=1),
        "others_min": others.min(axis=1),
        "others_max": others.max(axis=1),
    }
    return pd.DataFrame({"first": first, **columns}).reset_index()


def _outliers(probe: ResidualStreamProbe) -> pd.DataFrame:
    by_layer = probe.by_layer()
    names = ("residual_rms", "residual_kurtosis", "residual_max_over_median")
    return pd.DataFrame({"layer": range(len(probe.layers)), **{name: by_layer[name].numpy() for name in names}})


@torch.no_grad()
def _open_gates(model: PreTrainedModel, tokens: torch.Tensor) -> pd.DataFrame:
    """By layer, the share of gates above zero in the feed-forward network: what a ReLU in its place would keep."""
    rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(len(decoder_blocks(model)))}
    with ExitStack() as stack:
        for layer, block in enumerate(decoder_blocks(model).values()):

            def keep(module: nn.Module, inputs: object, output: torch.Tensor, layer: int = layer) -> None:
                rows[layer].append((output > 0).double().mean(dim=(1, 2)))

            stack.enter_context(block.get_submodule("mlp.gate_proj").register_forward_hook(keep))
        evaluation_losses(model, tokens, 4)
    return pd.DataFrame([{"layer": layer, "open": torch.cat(found).mean().item()} for layer, found in rows.items()])


@torch.no_grad()
def _pruned(model: PreTrainedModel, named: RealModel, tokens: torch.Tensor, results: Path) -> pd.DataFrame:
    """The loss without k layers, in three orders; the first two are of ``depth``, from other sequences."""
    skipped, distances = (
        frame[frame["model"] == named.name]
        for frame in (pd.read_csv(results / f"{name}.csv") for name in ("skipped_layers", "angular_distance"))
    )
    recorded = record(model, tokens)
    plain = sequence_losses(recorded.logits, tokens).double().numpy()
    n_layer = len(skipped)
    rows = []
    for n_dropped in N_DROPPED:
        chosen: dict[str, Sequence[int]] = {
            ORDERS[0]: skipped.nsmallest(n_dropped, "loss_increase_nats")["layer"].tolist(),
            ORDERS[1]: most_similar_block(distances, n_dropped),
            ORDERS[2]: range(n_layer - n_dropped, n_layer),
        }
        for order, layers in chosen.items():
            losses = sequence_losses(recorded.logits_without(layers), tokens).double().numpy()
            rows.append(
                {
                    "order": order,
                    "n_dropped": n_dropped,
                    "layers": " ".join(map(str, sorted(layers))),
                    "loss_increase_nats": (losses - plain).mean(),
                    "standard_error": _error(losses - plain),
                }
            )
    return pd.DataFrame(rows)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Five digits: what is shown has fewer, and the files stay small."""
    with written_whole(path) as temporary:
        frame.to_csv(temporary, index=False, na_rep="nan", float_format="%.5g")
