"""ReLU's Revival (Jha & Reagen, 2024): GELU and ReLU with and without LayerNorm, Table 2, Figures 1, 2 and 4."""

from __future__ import annotations

from normfree.columns import EVAL_PPL
from normfree.entropy import uniform_entropy_bound
from normfree.report import BANDS, Link, Section, published_head_entropy
from normfree.report.entropy_figures import headwise_entropy_distribution, headwise_entropy_heatmaps
from normfree.report.frames import seed_pairs
from normfree.runner import COMPARABLE, Configuration, Findings, Study, StudyPage, head_entropy_frame

PAPER = Link("ReLU's Revival, Jha & Reagen 2024", "https://arxiv.org/abs/2410.09637")
PAPER_TOKENS = 2.1e9
PAPER_SEQUENCE_LENGTH = 128

# As in the public code of the paper, every configuration keeps the final LayerNorm.
LAYERNORM_GELU = Configuration("SM+LN+G", {"norm": "layernorm", "activation": "gelu"})
LAYERNORM_RELU = Configuration("SM+LN+R", {"norm": "layernorm", "activation": "relu"})
GELU = Configuration("SM+G", {"norm": "none", "activation": "gelu"})
RELU = Configuration("SM+R", {"norm": "none", "activation": "relu"})


def describe(page: StudyPage) -> Findings:
    """The paper's Figures 1, 2 and 4 from the study's runs, and its Figure 1 redrawn from its published values."""
    heads = head_entropy_frame(page.results)
    figures = [
        page.figure(
            "headwise-entropy",
            headwise_entropy_heatmaps(heads, maximum=page.uniform_bound),
            "Attention entropy of every head in nats (compare Figure 1 of the paper): final weights, evaluation "
            "tokens, one colour scale. Yellow: near-uniform attention; the mark on the scale is the entropy of "
            f"uniform attention, {page.uniform_bound:.3f} nats.",
        ),
        page.figure(
            "entropy-distribution",
            headwise_entropy_distribution(heads),
            "Share of heads in each quarter of the entropy range (compare Figure 2a); max is the largest entropy "
            "over the heads of all configurations.",
        ),
        page.loss_figure("Evaluation loss over training (compare Figure 2b)."),
        page.layer_entropy_figure(" (compare Figure 4)"),
    ]
    published = page.figure(
        "headwise-entropy-published",
        headwise_entropy_heatmaps(published_head_entropy(), maximum=uniform_entropy_bound(PAPER_SEQUENCE_LENGTH)),
        "Published, not measured here: Figure 1 of the paper, redrawn from its annotated values (GPT-2, T = 128, 2.1 B "
        "tokens of CodeParrot).",
    )
    sections = [Section("Figures", figures), Section("The published heatmaps", [published])]
    return Findings(_lead(page), sections, scale_limits(page) + _LIMITS)


_LIMITS = (
    "A small model after a short training can show whether removing LayerNorm hurts GELU more than ReLU, and "
    "where attention stays uniform; it cannot settle the order of the two baselines, which differ by little, nor "
    "speak for larger models."
)


def scale_limits(page: StudyPage) -> str:
    """How far the runs' scale is from the paper's, and what their perplexities can be compared with."""
    share = page.share_of(PAPER_TOKENS, "the 2.1 B training tokens of ReLU's Revival")
    return f"{share}{COMPARABLE} "


def _lead(page: StudyPage) -> str:
    """What the table says."""
    table = page.table
    ranked = table.dropna(subset=[EVAL_PPL]).sort_values(EVAL_PPL)
    sentences = [f"Perplexity, best first: {' < '.join(ranked['configuration'])}."]
    diverged = table.loc[table["diverged"] > 0, "configuration"].tolist()
    if diverged:
        sentences.append(f"Runs diverged: {', '.join(diverged)}.")
    published = table.dropna(subset=["published_ppl"]).sort_values("published_ppl")["configuration"].tolist()
    if len(published) == len(table):
        verdict = "the same order" if published == ranked["configuration"].tolist() else "another order"
        sentences.append(f"The paper reports {' < '.join(published)}: {verdict}.")
    rows = table.set_index("configuration")
    if {GELU.label, RELU.label} <= set(rows.index):
        relu, gelu = seed_pairs(page.recipe_runs, RELU.label, GELU.label, EVAL_PPL)
        gain = 100 * (1 - (relu / gelu).mean(skipna=False))
        if gain == gain:
            comparison = "lower" if gain > 0 else "higher"
            top = 100 * rows[BANDS[-1]]
            sentences.append(
                f"Without LayerNorm, ReLU's perplexity is {abs(gain):.1f} % {comparison} than GELU's, and "
                f"{top[GELU.label]:.0f} % of the heads are in the top entropy band with GELU, {top[RELU.label]:.0f} % "
                "with ReLU (published for GPT-2: 8.2 % lower, 58 % and 23 %)."
            )
    return " ".join(sentences)


STUDY = Study(
    name="relu-revival",
    title="ReLU's Revival: GELU and ReLU with and without LayerNorm",
    question="GELU or ReLU, with or without LayerNorm?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, LAYERNORM_RELU, GELU, RELU),
    describe=describe,
    papers=(PAPER,),
)
