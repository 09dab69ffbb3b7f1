"""Distillation of a model with LayerNorm into norm-free ones (Hinton, Vinyals & Dean 2015; ReLU's Revival, App. D)."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.report import Link, Section, Table
from normfree.runner import Configuration, Findings, Study, StudyPage
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, PAPER, RELU, scale_limits
from normfree.training.objectives import DistillationOptions

TEACHER = LAYERNORM_GELU
LOGITS = DistillationOptions(teacher=TEACHER.label, weight=0.5, temperature=2.0)
ENTROPY = DistillationOptions(teacher=TEACHER.label, weight=0.5, temperature=2.0, entropy_weight=1.0)
WAYS = {"distilled": LOGITS, "distilled with entropy": ENTROPY}
"""Objectives of taught students, by the ending of their labels."""


def taught(student: Configuration, way: str) -> Configuration:
    """The same model, taught in one of ``WAYS``."""
    return replace(student, label=f"{student.label}, {way}", objective=WAYS[way].model_dump())


STUDENTS = (GELU, RELU)


def describe(page: StudyPage) -> Findings:
    """The part of the gap to the teacher that each way of teaching closes, and attention entropy."""
    gaps = _gaps(page)
    sections = [
        Section(
            "The gap to the teacher",
            [
                Table(
                    gaps,
                    f"Evaluation loss in nats, mean over seeds, and the part of the gap to {TEACHER.label} that is "
                    "closed. All students see the same tokens in the same order, taught or not.",
                    formats={"Loss": ".3f", "Gap": "+.3f", "Closed": ".0%"},
                    notes=[
                        "Gap: loss minus the teacher's of the same seed. Closed: 1 minus gap / gap of the same student "
                        "alone; negative where teaching made it worse, NaN where there was no gap or a run diverged."
                    ],
                ),
                page.loss_figure("Evaluation loss over training: plain cross-entropy for all."),
            ],
        ),
        Section("Attention entropy of teacher and students", [page.head_entropy_figure(), page.layer_entropy_figure()]),
    ]
    return Findings(_lead(page, gaps), sections, scale_limits(page) + _LIMITS)


_LIMITS = (
    f"One mixture is tried: {LOGITS.weight:g} of the divergence at temperature {LOGITS.temperature:g}, entropy "
    f"matching with weight {ENTROPY.entropy_weight:g}. A taught student sees as many tokens as one alone, but each "
    "step also runs the teacher, and the teacher has been trained on the same tokens before."
)


def _gaps(page: StudyPage) -> pd.DataFrame:
    """One row a student and way of training: Configuration, Loss, Gap (both nats), Closed (share, NaN for alone)."""
    table = page.table.set_index("configuration")
    losses, gaps = table[EVAL_LOSS].to_dict(), table["loss_difference"].to_dict()
    rows = []
    for student in STUDENTS:
        for label in (student.label, *(taught(student, way).label for way in WAYS)):
            if label not in losses:
                continue
            alone, gap = gaps.get(student.label, math.nan), gaps[label]
            is_taught = label != student.label
            closed = 1 - gap / alone if is_taught and alone > 0 else math.nan
            rows.append({"Configuration": label, "Loss": losses[label], "Gap": gap, "Closed": closed})
    return pd.DataFrame(rows, columns=["Configuration", "Loss", "Gap", "Closed"])


def _lead(page: StudyPage, gaps: pd.DataFrame) -> str:
    """The part of each student's gap that is closed."""
    gap_of = gaps.set_index("Configuration")["Gap"].to_dict()
    closed_of = gaps.set_index("Configuration")["Closed"].to_dict()
    perplexity = page.table.set_index("configuration")[EVAL_PPL].to_dict()
    sentences = [f"The teacher, {TEACHER.label}, has a perplexity of {perplexity[TEACHER.label]:.2f}."]
    for student in STUDENTS:
        if student.label not in gap_of:
            continue
        gap = gap_of[student.label]
        if math.isnan(gap):
            sentences.append(f"{student.label} has no gap to speak of: a run of it or of the teacher diverged.")
            continue
        behind = f"{gap:.3f} nats behind" if gap > 0 else "no worse, so there is no gap to close"
        ways = []
        for way in WAYS:
            label = taught(student, way).label
            if label in perplexity:
                closed = f": {_closed(closed_of[label])}" if gap > 0 else ""
                ways.append(f"; {way} {perplexity[label]:.2f}{closed}")
        sentences.append(f"{student.label} alone has {perplexity[student.label]:.2f}, {behind}{''.join(ways)}.")
    return " ".join(sentences)


def _closed(share: float) -> str:
    if math.isnan(share):
        return "it has no finite loss"
    return f"it closes {100 * share:.0f} % of the gap" if share >= 0 else f"the gap grows by {-100 * share:.0f} %"


STUDY = Study(
    name="distillation",
    title="Distillation of a model with LayerNorm into norm-free ones",
    question="How far does a teacher with LayerNorm lift a student without it?",
    baseline=TEACHER.label,
    configurations=lambda preset: (
        TEACHER,
        *(each for student in STUDENTS for each in (student, *(taught(student, way) for way in WAYS))),
    ),
    describe=describe,
    papers=(
        PAPER,
        Link("Distilling the Knowledge in a Neural Network, Hinton et al. 2015", "https://arxiv.org/abs/1503.02531"),
    ),
)
