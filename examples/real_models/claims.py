"""Which claims of the five papers hold in the two models, decided by the measured numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .measured import Measured

REVIVAL = "ReLU's Revival"
REMOVAL = "Transformers Don't Need LayerNorm"
CURSE = "The Curse of Depth"
SPARK = "Spark Transformer"
HYBRID = "HybridNorm"

HOLDS, NOT, UNTOLD, REFUSED = "**holds**", "**does not hold**", "**cannot be told**", "**not measured**"


@dataclass(frozen=True)
class Claim:
    """A claim, and what a model's numbers say to it: a verdict and the numbers behind it."""

    paper: str
    text: str
    check: Callable[[Measured], tuple[str, str]]


def _verdict(holds: bool, numbers: str) -> tuple[str, str]:
    return (HOLDS if holds else NOT), numbers


def _overload(model: Measured) -> tuple[str, str]:
    early, late = model.top_band_share(early=True), model.top_band_share(early=False)
    early_third = f"{100 * early:.0f} % of the heads of the first third of the layers in the top quarter"
    shown = f"{early_third}, {100 * late:.0f} % of the others"
    return _verdict(early < 0.25 and late < 0.25, shown)


def _growth(model: Measured) -> tuple[str, str]:
    law = model.depth["variance_growth"]
    distinct = "" if model.depth["variance_growth_is_distinct"] else ", not distinct from the next"
    placement = "; its norms are not Pre-LN" if model.has_inner_norms else ""
    shown = f"{law}{distinct}; last over first {model.depth['variance_ratio']:,.0f}{placement}"
    return _verdict(law == "exponential", shown)


def _half_does_little(model: Measured) -> tuple[str, str]:
    share = model.depth["deep_half_share"]
    shown = f"the deeper half has {100 * share:.0f} % of the loss increase; effective depth {model.effective_depth}"
    return _verdict(share < 1 / 3, shown)


def _near_identity(model: Measured) -> tuple[str, str]:
    first, last = model.jacobian_distance(deep=False), model.jacobian_distance(deep=True)
    return _verdict(last < 0.5 * first, f"‖J − I‖ / √(T d): {first:.2g} in the first half, {last:.2g} in the deeper")


def _droppable(model: Measured) -> tuple[str, str]:
    k, increase = model.quarter_dropped()
    shown = f"{k} of {model.n_layer} left out cost {increase:.2f} nats, in the cheapest order"
    return _verdict(increase < 0.1 * model.loss, shown)


def _first_token(model: Measured) -> tuple[str, str]:
    ratio, layer = model.first_token_ratio()
    return _verdict(ratio > 10, f"std {ratio:.0f} times that of other tokens in layer {layer}")


def _attribution(model: Measured) -> tuple[str, str]:
    if model.interpretation is None:
        return REFUSED, "its norms act on what is written into the stream"
    error = model.interpretation["attribution_nmae"]
    return _verdict(error > 0.1, f"median error over the heads {100 * error:.0f} %")


def _confidence(model: Measured) -> tuple[str, str]:
    if model.interpretation is None:
        return REFUSED, "its norms act on what is written into the stream"
    share = model.interpretation["norm_mediated_share"]
    return _verdict(share > 0.2, f"{100 * share:.0f} % of their effect goes through the final norm's std")


def _lazy(model: Measured) -> tuple[str, str]:
    share = model.open_gate_share
    return _verdict(share > 0.2, f"{100 * share:.0f} % of the gates are above zero")


def _norms_inside(model: Measured) -> tuple[str, str]:
    norms = "with such norms" if model.has_inner_norms else "without such norms"
    return UNTOLD, f"{norms} the effective depth is {100 * model.depth['effective_depth_share']:.0f} % of the layers"


CLAIMS = (
    Claim(REVIVAL, "With normalization few heads attend almost uniformly, in early layers too", _overload),
    Claim(CURSE, "Under Pre-LN the variance of the residual stream grows exponentially with depth", _growth),
    Claim(CURSE, "About half of the layers, the deeper ones, do little", _half_does_little),
    Claim(CURSE, "Deep blocks are close to the identity", _near_identity),
    Claim(CURSE, "Up to a quarter of the layers can be left out at little cost", _droppable),
    Claim(REMOVAL, "The first token's residual stream is many times larger than that of others", _first_token),
    Claim(REMOVAL, "With norms, direct logit attribution is not exact", _attribution),
    Claim(REMOVAL, "Confidence neurons work through the final norm", _confidence),
    Claim(SPARK, "Gated models without ReLU are not sparse: many neurons are active", _lazy),
    Claim(HYBRID, "Norms of queries, keys and branches' outputs make more of the depth useful", _norms_inside),
)
