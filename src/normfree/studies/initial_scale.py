"""Does GELU need LayerNorm because the residual stream of a norm-free model begins where GELU is linear?

GELU(x) = x / 2 + O(x²): where inputs are small, a feed-forward network with GELU is nearly linear. ReLU is homogeneous,
ReLU(c x) = c ReLU(x), and does not know the scale of its inputs. LayerNorm brings inputs to one; so does a fixed gain
on the token embeddings, at the start of training. If scale is what GELU lacks, the gain helps GELU and not ReLU. Models
with LayerNorm show what the gain does by other ways, such as larger updates of the embeddings.
"""

from __future__ import annotations

import pandas as pd

from normfree.columns import EVAL_LOSS, RESIDUAL_RMS
from normfree.report import Section
from normfree.report.frames import seed_pairs
from normfree.report.numbers import number
from normfree.report.overload import perplexity_and_overload
from normfree.runner import Configuration, Findings, Study, StudyPage, head_entropy_frame, telemetry_frame
from normfree.studies.hybrid_activations import layer_entropy_by_configuration
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, LAYERNORM_RELU, PAPER, RELU, scale_limits

GAINS = (1, 4, 16, 64)
"""Of token embeddings, which begin with a std of 0.02."""
LINES = ((LAYERNORM_GELU, (1, 16)), (LAYERNORM_RELU, (1, 16)), (GELU, GAINS), (RELU, GAINS))
"""Models with the gains that each is trained with."""
SMALL = 0.5
"""GELU(x) differs from x / 2 by less than a fifth of |x| for |x| below this."""


def scaled(base: Configuration, gain: int) -> Configuration:
    """``base`` with its token embeddings times ``gain``."""
    if gain == 1:
        return base
    return Configuration(f"{base.label}, ×{gain}", {**base.model, "embedding_multiplier": gain})


CONFIGURATIONS = tuple(scaled(base, gain) for base, gains in LINES for gain in gains)


def describe(page: StudyPage) -> Findings:
    """Perplexity by gain, entropy by layer, and by how much each activation gains."""
    rows = [
        {"line": base.label, "place": GAINS.index(gain), "value": f"×{gain}", **page.overload[scaled(base, gain).label]}
        for base, gains in LINES
        for gain in gains
        if scaled(base, gain).label in page.overload
    ]
    figures = []
    if rows:
        figures.append(
            page.figure(
                "perplexity-by-gain",
                perplexity_and_overload(pd.DataFrame(rows), changed="gain of the token embeddings"),
                "Perplexity and share of heads in the top quarter of the entropy range by the gain of the token "
                "embeddings.",
            )
        )
    small = small_layers(telemetry_frame(page.results, [RESIDUAL_RMS]))
    figures += [
        page.figure(
            "entropy-by-layer",
            layer_entropy_by_configuration(
                head_entropy_frame(page.results),
                marked=small,
                mark=f"RMS at first < {SMALL:g}",
                maximum=page.uniform_bound,
            ),
            "Attention entropy by layer, mean over heads: final weights, evaluation tokens. A dot marks layers whose "
            f"output, the residual stream, had an RMS below {SMALL:g} when it was first recorded.",
        ),
        page.loss_figure(),
    ]
    return Findings(_lead(page.recipe_runs), [Section("By initial scale", figures)], scale_limits(page) + _LIMITS)


_LIMITS = "Position embeddings keep their scale, and are small next to token embeddings with a large gain."


def small_layers(rms: pd.DataFrame) -> dict[str, list[int]]:
    """The layers with an RMS below ``SMALL`` at the first recorded step, mean over seeds, by configuration.

    Args:
        rms: configuration, seed, step, layer, residual_rms.
    """
    first = rms[rms["step"] == rms["step"].min()]
    means = first.groupby(["configuration", "layer"], as_index=False, sort=False)[RESIDUAL_RMS].mean()
    small = means[means[RESIDUAL_RMS] < SMALL]
    return {str(name): each["layer"].tolist() for name, each in small.groupby("configuration", sort=False)}


def gained(runs: pd.DataFrame) -> pd.DataFrame:
    """How many nats each gain takes off the loss of the unscaled model, over the seeds that both have.

    Args:
        runs: columns configuration, seed, eval_loss (nats per token; NaN: diverged).

    Returns:
        Columns base (the unscaled configuration), configuration and gained_nats (mean over seeds; NaN: one of the
        runs diverged). A gain without such a seed has no row.
    """
    rows = []
    for base, gains in LINES:
        for label in (scaled(base, gain).label for gain in gains[1:]):
            unscaled, losses = seed_pairs(runs, base.label, label, EVAL_LOSS)
            if len(losses):
                nats = (unscaled - losses).mean(skipna=False)
                rows.append({"base": base.label, "configuration": label, "gained_nats": nats})
    return pd.DataFrame(rows, columns=["base", "configuration", "gained_nats"])


def _lead(runs: pd.DataFrame) -> str:
    """What the best gain is worth to each model."""
    finite = gained(runs).dropna()
    best = finite.loc[finite.groupby("base", sort=False)["gained_nats"].idxmax()]
    sentences = [
        f"{row['configuration']} gains {number(row['gained_nats'], '+.3f')} nats on {row['base']}"
        for _, row in best.iterrows()
    ]
    return f"{'; '.join(sentences)}." if sentences else "No model has been trained with two gains yet."


STUDY = Study(
    name="initial-scale",
    title="The scale at which norm-free models begin",
    question="Does GELU need LayerNorm because residual streams begin too small for it?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: CONFIGURATIONS,
    describe=describe,
    papers=(PAPER,),
)
