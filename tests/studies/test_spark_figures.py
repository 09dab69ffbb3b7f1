"""Figure and table of sparsity from frames a test can follow by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from normfree.errors import InputError
from normfree.report import load_published
from normfree.studies.spark.figures import active_neurons, sparsity_table

SETTING = {"model": "tiny", "context_length": 128}
SHARES = {"SM+LN+G": 1.0, "Spark-FFN": 0.08, "SM+R": 0.3}
DENSE = "SM+LN+G"


def measured(name: str, layer: int, seed: int) -> float:
    """(1 − 0.1 layer)(1 − 0.02 seed) of the configuration's share; the dense one has all of it."""
    return SHARES[name] if name == DENSE else SHARES[name] * (1 - 0.1 * layer) * (1 - 0.02 * seed)


def sparsity(seeds: tuple[int, ...] = (0, 1), diverged: str | None = None) -> pd.DataFrame:
    """What was measured of two seeds and four layers; nothing of ``diverged``."""
    return pd.DataFrame(
        [
            {
                **SETTING,
                "configuration": name,
                "seed": seed,
                "layer": layer,
                "active_share": np.nan if name == diverged else measured(name, layer, seed),
                "attended_keys": 9.5 + seed if name == "Spark-FFN" else np.nan,
            }
            for name in SHARES
            for seed in seeds
            for layer in range(4)
        ]
    )


def dynamics() -> pd.DataFrame:
    steps = pd.DataFrame({"step": range(0, 50, 10)}).assign(tokens=lambda frame: 4096 * frame["step"])
    return sparsity().drop(columns="attended_keys").merge(steps, how="cross")


def savings(flops: float = 3e6) -> pd.DataFrame:
    rows = [
        {**SETTING, "configuration": name, "seed": seed, "flops": flops / (4 if name == "Spark-FFN" else 1)}
        for name in SHARES
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_the_table_by_hand() -> None:
    table = sparsity_table(sparsity(), savings(), baseline="SM+LN+G").set_index("Configuration")
    assert table.index.tolist() == list(SHARES)
    row = table.loc["Spark-FFN"]
    # mean over layers 8 % times 0.85, over seeds times 0.99; t(0.975, 1) = 12.706
    assert row["Active neurons, %"] == f"{6.8 * 0.99:.2f} ± {12.706 * 6.8 * 0.02 / 2:.2f}"
    assert row["By layer, %"] == f"{8 * 0.99 * 0.7:.1f} to {8 * 0.99:.1f}"
    assert row["Keys attended"] == "10.00 ± 6.35"
    assert row["MFLOPs a token"] == "0.75 ± 0.00"
    assert row["× fewer"] == "4.00 ± 0.00"
    assert table.loc["SM+R", "Keys attended"] == "–"
    assert table.loc["SM+LN+G", "× fewer"] == "1.00 ± 0.00"


def test_the_speed_of_decode_is_the_mean_of_the_medians_of_runs() -> None:
    rounds = [(0, 8.0, 4.0), (1, 9.0, 3.0), (2, 5.0, 5.0)]
    decode = pd.DataFrame(
        [
            {
                **SETTING,
                "configuration": "Spark-FFN",
                "seed": seed,
                "round": number,
                "dense_seconds": dense,
                "sparse_seconds": sparse,
            }
            for seed in range(2)
            for number, dense, sparse in rounds[seed:]
        ]
    )
    table = sparsity_table(sparsity(), savings(), decode, baseline="SM+LN+G").set_index("Configuration")
    assert table["Decode, × as fast"].to_dict() == {"SM+LN+G": "–", "Spark-FFN": "2.00 ± 0.00", "SM+R": "–"}
    with pytest.raises(InputError, match="the decode frame lacks sparse_seconds"):
        sparsity_table(sparsity(), savings(), decode.drop(columns="sparse_seconds"), baseline="SM+LN+G")


def test_a_diverged_run_is_nan() -> None:
    table = sparsity_table(sparsity(diverged="SM+R"), savings(), baseline="SM+LN+G").set_index("Configuration")
    assert list(table.loc["SM+R", ["Active neurons, %", "By layer, %"]]) == ["NaN", "NaN"]
    assert "NaN" not in list(table.loc["Spark-FFN"])


def test_the_figure_shows_percent_by_layer_and_over_training() -> None:
    figure = active_neurons(sparsity(), dynamics(), nominal=0.08)
    by_layer, over_training = figure.axes
    lines = {str(line.get_label()): line for line in by_layer.lines}
    np.testing.assert_allclose(
        np.asarray(lines["Spark-FFN"].get_ydata()), [8 * 0.99 * (1 - 0.1 * layer) for layer in range(4)]
    )
    curve = next(line for line in over_training.lines if line.get_label() == "SM+R")
    assert np.asarray(curve.get_xdata()).tolist() == [4096 * step for step in range(0, 50, 10)]
    np.testing.assert_allclose(np.asarray(curve.get_ydata()), 30 * 0.85 * 0.99)
    nominal = by_layer.lines[-1]
    np.testing.assert_allclose(np.asarray(nominal.get_ydata()), [8, 8])
    assert DENSE not in lines
    assert figure.get_supxlabel() == "not drawn, every neuron active: SM+LN+G"
    assert by_layer.get_yscale() == "log"
    assert by_layer.get_ylim()[0] < 8 * 0.98 * 0.7
    assert by_layer.get_ylabel() == "active neurons (%, log)"


def test_dead_and_diverged_layers_leave_gaps() -> None:
    frame = sparsity(diverged="SM+R")
    frame.loc[(frame["configuration"] == "Spark-FFN") & (frame["layer"] == 2), "active_share"] = 0.0
    figure = active_neurons(frame, dynamics())
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    assert np.isnan(lines["SM+R (2 of 2 not finite)"]).all()
    assert np.isnan(lines["Spark-FFN"]).tolist() == [False, False, True, False]
    figure.canvas.draw()


def test_a_frame_without_its_columns_is_refused() -> None:
    with pytest.raises(InputError, match="the sparsity frame lacks attended_keys"):
        active_neurons(sparsity().drop(columns="attended_keys"), dynamics())
    with pytest.raises(InputError, match="the savings frame lacks flops"):
        sparsity_table(sparsity(), savings().drop(columns="flops"), baseline="SM+LN+G")


def test_the_published_claims_are_those_of_the_abstract() -> None:
    claims = load_published("spark_transformer_claims").set_index("quantity")["value"]
    assert claims.tolist() == [8, 256, 2.5, 1.79, 1.4]
    assert claims["decode speed-up on CPU"] == 1.79
