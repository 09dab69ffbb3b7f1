"""What was measured of one model, as the page's text and its claims need it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .packages import RealModel

TOP_BAND = 0.75
"""From this share of the largest entropy of any head on, a head is in the top band (ReLU's Revival, Section 3)."""
SINK = 0.3
MASSIVE = 10
"""From this ratio of stds on, the first token is called massive."""


@dataclass(frozen=True)
class Measured:
    """The rows of all results about ``model``."""

    model: RealModel
    folder: Path
    has_inner_norms: bool

    def rows(self, name: str, label: str | None = None) -> pd.DataFrame:
        """Those of ``name``.csv about the model, or about one run of it."""
        path = self.folder / f"{name}.csv"
        if not path.is_file():
            return pd.DataFrame()
        frame = pd.read_csv(path)
        return frame[frame["model"] == (label or self.model.name)].drop(columns="model").reset_index(drop=True)

    def row(self, name: str, label: str | None = None) -> dict[str, Any]:
        (row,) = self.rows(name, label).to_dict("records")
        return {str(key): value for key, value in row.items()}

    def refusal(self, command: str) -> str:
        """Why ``command`` did not measure the model: the last line that it said."""
        runs = pd.read_csv(self.folder / "commands.csv", keep_default_na=False)
        (said,) = runs.loc[(runs["command"] == command) & (runs["label"] == self.model.name), "refusal"]
        return str(said).removeprefix("normfree: ").removeprefix("error: ")

    @property
    def n_layer(self) -> int:
        return int(self.depth["n_layer"])

    @property
    def loss(self) -> float:
        return float(self.row("losses")["loss_nats"])

    @property
    def depth(self) -> dict[str, Any]:
        return self.row("summary")

    @property
    def effective_depth(self) -> str:
        return f"{self.depth['effective_depth']:.1f} of {self.n_layer}"

    @property
    def interpretation(self) -> dict[str, Any] | None:
        return None if self.rows("interpretation").empty else self.row("interpretation")

    @property
    def open_gate_share(self) -> float:
        return float(self.rows("open_gates")["open"].mean())

    def top_band_share(self, *, early: bool) -> float:
        """The share of heads in the top band, of the first third of the layers, or of the others."""
        heads = self.rows("heads")
        is_early = heads["layer"] < heads["layer"].nunique() / 3
        chosen = heads[is_early if early else ~is_early]
        return float((chosen["entropy_nats"] >= TOP_BAND * heads["entropy_nats"].max()).mean())

    def top_band_share_of(self, label: str) -> float:
        """The share of heads of a run in the top band, of all layers."""
        entropy = self.rows("heads", label)["entropy_nats"]
        return float((entropy >= TOP_BAND * entropy.max()).mean())

    def first_token_ratio(self, label: str | None = None) -> tuple[float, int]:
        """The largest ratio of the first token's std to the median of the others, over layers, and its layer."""
        stds = self.rows("residual_stds", label)
        ratios = (stds["first"] / stds["others_median"]).to_numpy(dtype=np.float64)
        return float(ratios.max()), int(ratios.argmax())

    def massive_layers(self, label: str | None = None) -> list[int]:
        """The layers after whose block the first token is massive."""
        stds = self.rows("residual_stds", label)
        return [int(each) for each in stds.loc[stds["first"] > MASSIVE * stds["others_median"], "layer"]]

    def massive_from(self, label: str | None = None) -> int | None:
        return next(iter(self.massive_layers(label)), None)

    def sink_layers(self, label: str | None = None) -> list[int]:
        """The layers whose heads pay 30 % of their attention to the first token, on average."""
        shares = self.rows("heads", label).groupby("layer")["sink_share"].mean()
        return [int(each) for each in shares[shares > SINK].index]

    def sinks_from(self, label: str | None = None) -> int | None:
        return next(iter(self.sink_layers(label)), None)

    def sink_rate(self, label: str | None = None) -> float:
        """The share of heads that pay at least 30 % of their attention to the first token."""
        return float((self.rows("heads", label)["sink_share"] > SINK).mean())

    def jacobian_distance(self, *, deep: bool) -> float:
        """The median over the deeper half of the layers, or over the others: single blocks are far from the rest."""
        distances = self.rows("jacobian_distance")
        is_deep = distances["layer"] >= self.n_layer - self.n_layer // 2
        return float(distances.loc[is_deep if deep else ~is_deep, "jacobian_distance"].median())

    def rate(self) -> dict[str, Any]:
        """The best law of growth of the variance, all tokens but the first."""
        growth = self.rows("variance_growth")
        (best,) = growth[growth["is_best"] & (growth["tokens"] == "without first")].to_dict("records")
        return {str(key): value for key, value in best.items()}

    def next_law(self) -> dict[str, Any]:
        """The second best law of it."""
        growth = self.rows("variance_growth")
        others = growth[~growth["is_best"] & (growth["tokens"] == "without first")]
        return {str(key): value for key, value in others.iloc[others["aicc"].argmin()].items()}

    def best_pruned(self, n_dropped: int) -> dict[str, Any]:
        """The order that costs least at ``n_dropped``."""
        pruned = self.rows("pruned")
        at = pruned[pruned["n_dropped"] == n_dropped]
        return {str(key): value for key, value in at.iloc[at["loss_increase_nats"].argmin()].items()}

    def quarter_dropped(self) -> tuple[int, float]:
        """The largest measured number of layers that is at most a quarter of all, and what the best order costs."""
        numbers = self.rows("pruned")["n_dropped"]
        k = int(numbers[numbers <= self.n_layer / 4].max())
        return k, float(self.best_pruned(k)["loss_increase_nats"])

    def widest_outlier(self) -> dict[str, Any]:
        """The layer with the largest ratio of a token's largest channel to its median one."""
        outliers = self.rows("outliers")
        return {str(key): value for key, value in outliers.iloc[outliers["residual_max_over_median"].argmax()].items()}
