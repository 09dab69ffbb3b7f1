"""ReLU's Revival (Jha & Reagen, 2024): GELU and ReLU with and without LayerNorm, Table 2, Figures 1, 2 and 4."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.files import write_text
from normfree.report import (
    BANDS,
    Block,
    Callout,
    Code,
    FigureBlock,
    KeyValues,
    Paragraph,
    Section,
    Table,
    evaluation_loss_curves,
    formatted,
    headwise_entropy_distribution,
    headwise_entropy_heatmaps,
    layerwise_entropy_dynamics,
    load_published,
    perplexity_table,
    published_head_entropy,
    render_report,
    save_figure,
    table_notes,
    write_report,
)
from normfree.studies.frames import (
    eval_curve_frame,
    head_entropy_frame,
    layer_entropy_frame,
    results_frame,
    sequence_losses_frame,
)
from normfree.studies.study import (
    LEARNING_RATE_FACTORS,
    STUDY_FILE,
    SWEEP_DECAY,
    Configuration,
    Study,
    StudyFolder,
    best_learning_rates,
)
from normfree.training import RunResult
from normfree.training.configuration import read_yaml
from normfree.training.trainer import RESULTS_FILE

# The public code of the paper keeps the final LayerNorm in every configuration, and so do we.
STUDY = Study(
    name="relu-revival",
    title="ReLU's Revival: GELU and ReLU with and without LayerNorm",
    configurations=(
        Configuration("SM+LN+G", {"norm": "layernorm", "activation": "gelu"}),
        Configuration("SM+LN+R", {"norm": "layernorm", "activation": "relu"}),
        Configuration("SM+G", {"norm": "none", "activation": "gelu"}),
        Configuration("SM+R", {"norm": "none", "activation": "relu"}),
    ),
    baseline="SM+LN+G",
)

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"


def relu_revival_table(folder: StudyFolder, group: str = "runs") -> pd.DataFrame:
    """The table of the study (see :func:`normfree.report.perplexity_table`), the published column beside ours.

    Raises:
        InputError: no run of the baseline is finished.
    """
    results = _results(folder, group)
    return perplexity_table(
        results_frame(STUDY, results),
        head_entropy_frame(results),
        sequence_losses_frame(results),
        baseline=STUDY.baseline,
        published=_published(folder),
    )


def write_relu_revival_report(folder: StudyFolder) -> Path:
    """Writes ``results.csv``, ``figures/`` and ``report.html`` from the finished runs; returns the page's path.

    Raises:
        InputError: no run of the baseline is finished.
    """
    results = _results(folder, "runs")
    tuned = _finished(folder, "tuned")
    if {each.row["configuration"] for each in tuned} != {each.label for each in STUDY.configurations}:
        tuned = []  # the sweep is still under way
    frame = results_frame(STUDY, results).assign(learning_rate_source="recipe")
    if tuned:
        frame = pd.concat([frame, results_frame(STUDY, tuned).assign(learning_rate_source="tuned")], ignore_index=True)
    write_text(folder.path / RESULTS_FILE, frame.to_csv(index=False, na_rep="nan"))

    table = relu_revival_table(folder)
    sections = [_result_section(folder, table)]
    if tuned:
        sections.append(_tuned_section(folder, tuned))
    sections.append(_figures_section(folder, results))
    sections.append(_published_section(folder))
    sections.append(_method_section(folder, results))
    page = render_report(
        title=STUDY.title,
        lead=_lead(table),
        sections=sections,
        meta={
            "Made by": f"normfree {importlib.metadata.version('normfree')}",
            "Date": datetime.date.today().isoformat(),
            "Preset": folder.preset_name,
        },
    )
    write_report(folder.path / REPORT_FILE, page)
    return folder.path / REPORT_FILE


def _results(folder: StudyFolder, group: str) -> list[RunResult]:
    results = _finished(folder, group)
    if STUDY.baseline not in {each.row["configuration"] for each in results}:
        raise InputError(f"{folder.path} has no finished run of {STUDY.baseline} yet; let `normfree study` go on")
    return results


def _finished(folder: StudyFolder, group: str) -> list[RunResult]:
    """The finished runs at the recipe's learning rate (``runs``) or each at its best one (``tuned``), in order."""
    results = folder.results("runs")
    if group == "tuned":
        # Where the recipe's rate was the best one, its run is the tuned run.
        rates = best_learning_rates(folder)
        kept = [each for each in results if rates.get(each.row["configuration"]) == each.row["learning_rate"]]
        results = [*kept, *folder.results("tuned")]
    order = [configuration.label for configuration in STUDY.configurations]
    return sorted(results, key=lambda each: (order.index(each.row["configuration"]), each.row["seed"]))


def _published(folder: StudyFolder) -> pd.DataFrame | None:
    column = folder.preset.published
    if column is None:
        return None
    table = load_published("relu_revival_table2")
    return table[(table["model"] == column.model) & (table["context_length"] == column.context_length)]


def _lead(table: pd.DataFrame) -> str:
    """What the table says, in words that hold whatever the numbers are."""
    ranked = table.dropna(subset=["eval_ppl"]).sort_values("eval_ppl")
    sentences = [f"Perplexity, best first: {' < '.join(ranked['configuration'])}."]
    diverged = table.loc[table["diverged"] > 0, "configuration"].tolist()
    if diverged:
        sentences.append(f"Runs diverged: {', '.join(diverged)}.")
    published = table.dropna(subset=["published_ppl"]).sort_values("published_ppl")["configuration"].tolist()
    if len(published) == len(table):
        verdict = "the same order" if published == ranked["configuration"].tolist() else "another order"
        sentences.append(f"The paper reports {' < '.join(published)}: {verdict}.")
    rows = table.set_index("configuration")
    if {"SM+G", "SM+R"} <= set(rows.index) and rows.loc[["SM+G", "SM+R"], "eval_ppl"].notna().all():
        gelu, relu = rows.loc["SM+G"], rows.loc["SM+R"]
        gain = 100 * (1 - relu["eval_ppl"] / gelu["eval_ppl"])
        comparison = "lower" if gain > 0 else "higher"
        sentences.append(
            f"Without LayerNorm, ReLU's perplexity is {abs(gain):.1f} % {comparison} than GELU's, and "
            f"{100 * gelu[BANDS[-1]]:.0f} % of the heads are in the top entropy band with GELU, "
            f"{100 * relu[BANDS[-1]]:.0f} % with ReLU (published for GPT-2: 8.2 % lower, 58 % and 23 %)."
        )
    return " ".join(sentences)


def _result_section(folder: StudyFolder, table: pd.DataFrame) -> Section:
    blocks: list[Block] = [
        _table_block(table, f"Evaluation loss and perplexity at the recipe's learning rate, {_rate(folder)}."),
    ]
    if (table["diverged"] > 0).any():
        blocks.append(
            Callout(
                "A diverged run has no perplexity. It is shown as NaN, and it is left out of no mean.",
                "warning",
            )
        )
    return Section("Result", blocks)


def _tuned_section(folder: StudyFolder, tuned: list[RunResult]) -> Section:
    rates = best_learning_rates(folder)
    sweep = pd.DataFrame([result.row for result in folder.results("sweep")])
    losses = sweep.pivot_table(
        index="configuration", columns="learning_rate", values="eval_loss", sort=False, dropna=False
    )
    losses = losses.reindex([each.label for each in STUDY.configurations])[sorted(losses.columns)]
    losses.columns = [f"{rate:g}" for rate in losses.columns]
    grid = [factor * folder.preset.recipe.learning_rate for factor in LEARNING_RATE_FACTORS]
    at_the_edge = [label for label, rate in rates.items() if rate in (min(grid), max(grid))]
    blocks: list[Block] = [
        Paragraph(
            f"Is a configuration worse, or only less tolerant of the learning rate? Each was trained at {len(grid)} "
            f"rates, with the whole run's warm-up and a decay over {100 * SWEEP_DECAY:.0f} % of the budget, and for "
            "the whole budget at its best rate: "
            + ", ".join(f"{label} {rate:g}" for label, rate in rates.items())
            + "."
        ),
        _table_block(relu_revival_table(folder, "tuned"), "The same table, each configuration at its own best rate."),
        Table(
            losses.reset_index(names="Configuration"),
            "The sweep: evaluation loss in nats by learning rate, one seed. NaN: diverged.",
            formats=dict.fromkeys(losses.columns, ".3f"),
        ),
        _figure(
            folder,
            "headwise-entropy-tuned",
            headwise_entropy_heatmaps(
                head_entropy_frame(tuned), maximum=uniform_entropy_bound(folder.preset.data.sequence_length)
            ),
            "Attention entropy of every head in nats, each configuration at its own best rate: final weights, "
            "evaluation tokens, one colour scale.",
        ),
    ]
    if at_the_edge:
        blocks.append(Callout(f"The best rate of {', '.join(at_the_edge)} is at the edge of the sweep.", "warning"))
    return Section("With tuned learning rates", blocks)


def _figures_section(folder: StudyFolder, results: list[RunResult]) -> Section:
    bound = uniform_entropy_bound(folder.preset.data.sequence_length)
    heads = head_entropy_frame(results)
    return Section(
        "Figures",
        [
            _figure(
                folder,
                "headwise-entropy",
                headwise_entropy_heatmaps(heads, maximum=bound),
                "Attention entropy of every head in nats (compare Figure 1 of the paper): final weights, evaluation "
                "tokens, one colour scale. Yellow heads look everywhere alike; the mark on the scale is the entropy of "
                f"uniform attention, {bound:.3f} nats.",
            ),
            _figure(
                folder,
                "entropy-distribution",
                headwise_entropy_distribution(heads),
                "Share of heads in each quarter of the entropy range (compare Figure 2a); max is the largest entropy "
                "over the heads of all configurations.",
            ),
            _figure(
                folder,
                "evaluation-loss",
                evaluation_loss_curves(eval_curve_frame(results)),
                "Evaluation loss over training (compare Figure 2b).",
            ),
            _figure(
                folder,
                "layerwise-entropy",
                layerwise_entropy_dynamics(layer_entropy_frame(results), bound=bound),
                "Entropy of each layer over training, mean over its heads, on training batches (compare Figure 4).",
            ),
        ],
    )


def _published_section(folder: StudyFolder) -> Section:
    figure = headwise_entropy_heatmaps(published_head_entropy(), maximum=uniform_entropy_bound(128))
    return Section(
        "The published heatmaps",
        [
            _figure(
                folder,
                "headwise-entropy-published",
                figure,
                "Published, not ours: Figure 1 of the paper, redrawn from its annotated values (GPT-2, T = 128, 2.1 B "
                "tokens of CodeParrot).",
            )
        ],
    )


def _method_section(folder: StudyFolder, results: list[RunResult]) -> Section:
    preset = folder.preset
    row = results[0].row
    provenance = read_yaml(results[0].folder / "config.yaml")["provenance"]
    seeds = sorted({int(each.row["seed"]) for each in results})
    length = preset.data.sequence_length
    facts = {
        "Model": f"{preset.model_name}: {row['n_parameters']:,} parameters with LayerNorm; final LayerNorm kept in all",
        "Corpus": _corpus_facts(preset.data.corpus, provenance),
        "Training": f"{int(row['tokens']):,} tokens ({row['epochs']:.2f} epochs), {int(row['steps']):,} steps of "
        f"{preset.recipe.batch_size} sequences of {length} tokens",
        "Evaluation": f"{int(row['eval_sequences']):,} sequences of files that no run was trained on",
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Precision": preset.recipe.precision,
        "Device": f"{provenance['device']}, {provenance['cpu_threads']} CPU threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
    }
    command = f"normfree study {STUDY.name} --preset {folder.preset_name} --seeds {','.join(map(str, seeds))}"
    paper_tokens = 2.1e9
    limits = (
        f"These runs saw {row['tokens'] / paper_tokens:.1%} of the paper's 2.1 B training tokens. "
        if row["tokens"] < paper_tokens
        else ""
    ) + (
        "Perplexities are comparable only between rows of one table: another tokenizer or corpus changes them. "
        "A small model after a short training can show whether removing LayerNorm hurts GELU more than ReLU, and "
        "where attention stays uniform; it cannot settle the order of the two baselines, which differ by little, nor "
        "speak for larger models."
    )
    if len(seeds) == 1:
        limits += " With one seed there is no estimate of the spread between seeds."
    return Section(
        "How it was made",
        [
            KeyValues(facts),
            Paragraph("All configurations start from the same weights and see the same batches in the same order."),
            Code(command),
            Callout(limits, "warning"),
            Paragraph("The whole configuration:"),
            Code((folder.path / STUDY_FILE).read_text(encoding="utf-8").rstrip()),
        ],
    )


def _corpus_facts(corpus: str, provenance: dict[str, Any]) -> str:
    statistics = provenance["corpus"]
    found, train, evaluation = statistics["corpus"], statistics["train"], statistics["eval"]
    reasons = ("duplicates", "undecodable", "binary", "too_large", "empty", "unreadable")
    skipped = ", ".join(f"{found[reason]:,} {reason.replace('_', ' ')}" for reason in reasons if found[reason])
    return (
        f"{corpus}: {found['documents']:,} documents, {found['bytes'] / 1e6:.0f} MB"
        f" (skipped: {skipped or 'none'});"
        f" {train['documents']:,} documents tokenized for training and {evaluation['documents']:,} for evaluation,"
        f" {evaluation['bytes_per_token']:.2f} bytes a token; fingerprint {provenance['corpus_fingerprint']}"
    )


def _table_block(table: pd.DataFrame, caption: str) -> Table:
    return Table(formatted(table), caption, notes=table_notes(table))


def _figure(folder: StudyFolder, name: str, figure: Figure, caption: str) -> FigureBlock:
    png = next(path for path in save_figure(figure, folder.path / FIGURES_FOLDER, name) if path.suffix == ".png")
    return FigureBlock(png.read_bytes(), alt=caption.split(":")[0], caption=caption)


def _rate(folder: StudyFolder) -> str:
    return f"{folder.preset.recipe.learning_rate:g}"
