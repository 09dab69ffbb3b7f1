"""A penalty on attention entropy that strays from a threshold each head learns (AERO, Jha & Reagen 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from normfree.columns import ENTROPY_THRESHOLD_NATS
from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.training.objectives.objective import Lesson, Objective, ObjectiveOptions, Term

PENALTY = "entropy_penalty"
_THRESHOLDS = "entropy_thresholds"


class EntropyRegularizationOptions(ObjectiveOptions):
    """cross-entropy + ``weight`` · penalty (see :func:`entropy_penalty`).

    weight: λ. The penalty is in nats².
    tolerance: γ, the margin around the threshold in which nothing is penalised, as a share of the largest entropy
        (0.2 in the paper).
    initial_threshold: where every head's threshold θ starts, as a share of the largest entropy.
    """

    kind: Literal["entropy_regularization"] = "entropy_regularization"
    weight: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    tolerance: float = Field(default=0.2, ge=0)
    initial_threshold: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _check_margin(self) -> EntropyRegularizationOptions:
        furthest = max(self.initial_threshold, 1 - self.initial_threshold)
        if self.tolerance >= furthest:
            raise ValueError(
                f"tolerance {self.tolerance:g} means no penalty: no entropy is further than {furthest:g} of the "
                f"maximum from a threshold of {self.initial_threshold:g}; lower it"
            )
        return self

    @property
    def reads_entropy(self) -> bool:
        return True

    def build(self, model: NormfreeConfig, folder: Path) -> EntropyRegularization:
        return EntropyRegularization(self, model)


class EntropyRegularization(Objective):
    """See :class:`EntropyRegularizationOptions`; the thresholds, [n_layer, n_head], are learned.

    Raises:
        InputError: the model has a sliding window, under which layers differ in their largest entropy.
    """

    reads_entropy = True

    def __init__(self, options: EntropyRegularizationOptions, model: NormfreeConfig) -> None:
        super().__init__()
        if model.sliding_window is not None:
            raise InputError(
                "objective entropy_regularization takes thresholds as shares of the largest entropy of full causal "
                f"attention, and the model has sliding_window {model.sliding_window}; leave one of them out"
            )
        self.options = options
        self.maximum = uniform_entropy_bound(model.n_positions)
        start = torch.full((model.n_layer, model.n_head), options.initial_threshold)
        self.learned[_THRESHOLDS] = nn.Parameter(start)

    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        assert entropy is not None, "reads_entropy asks for it"
        penalty = entropy_penalty(
            entropy, self.learned[_THRESHOLDS], maximum=self.maximum, tolerance=self.options.tolerance
        )
        return {PENALTY: Term(penalty, self.options.weight)}

    def head_values(self) -> dict[str, Tensor]:
        return {ENTROPY_THRESHOLD_NATS: self.learned[_THRESHOLDS].detach() * self.maximum}


def entropy_penalty(entropy: Tensor, thresholds: Tensor, *, maximum: float, tolerance: float) -> Tensor:
    """Mean over sequences, layers and heads of δ² where |δ| > γ E_max, else 0, with δ = E - θ E_max (AERO, Alg. 1).

    E is the entropy of a head, mean over the queries of one sequence. A NaN entropy makes the penalty NaN.

    Args:
        entropy: E, [batch, n_layer, n_head], nats.
        thresholds: θ, [n_layer, n_head], shares of ``maximum``. They get a gradient too.
        maximum: E_max in nats. This is the causal bound, mean over i of ln i; AERO takes ln T, which no head can reach.
        tolerance: γ.

    Returns:
        A scalar in nats².
    """
    deviation = entropy - thresholds * maximum
    tolerated = deviation.abs() <= tolerance * maximum
    return deviation.square().masked_fill(tolerated, 0.0).mean()
