import numpy as np
import pandas as pd
import pytest
from scipy import stats

from normfree.errors import InputError
from normfree.report.frames import SIGNAL_STATISTICS
from normfree.report.signal_curves import signal_propagation_dynamics, signal_propagation_over_depth
from normfree.studies.outliers import outlier_table, quantization_table

CONFIGURATIONS = ("SM+LN+G", "SM+G")
PANELS = ("residual_rms", "residual_kurtosis", "residual_max_over_median", "token_cosine_similarity")


def dynamics(seeds=(0, 1, 2), nan_run=None, nan_from=200):
    """Three layers at five steps; ``nan_run`` (configuration, seed) is NaN from step ``nan_from``."""
    draw = np.random.default_rng(3)
    rows = []
    for configuration in CONFIGURATIONS:
        for seed in seeds:
            for step in range(0, 500, 100):
                for layer in range(3):
                    values = dict(zip(SIGNAL_STATISTICS, draw.uniform(1, 9, len(SIGNAL_STATISTICS)), strict=True))
                    if (configuration, seed) == nan_run and step >= nan_from:
                        values = dict.fromkeys(SIGNAL_STATISTICS, np.nan)
                    run = {"model": "tiny", "context_length": 16, "configuration": configuration, "seed": seed}
                    rows.append({**run, "step": step, "layer": layer, **values})
    return pd.DataFrame(rows)


def signal(**options):
    frame = dynamics(**options)
    return frame[frame["step"] == 400].drop(columns="step")


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_depth_shows_the_mean_of_the_seeds_by_layer_with_their_range():
    frame = signal()
    figure = signal_propagation_over_depth(frame.sample(frac=1, random_state=1))
    assert len(figure.axes) == len(PANELS)
    for axes, name in zip(figure.axes, PANELS, strict=True):
        for configuration in CONFIGURATIONS:
            runs = frame[frame["configuration"] == configuration]
            line = lines(axes)[configuration]
            np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
            np.testing.assert_allclose(line.get_ydata(), runs.groupby("layer")[name].mean())
        bands = np.vstack([band.get_paths()[0].vertices for band in axes.collections])
        assert bands[:, 1].max() == pytest.approx(frame[name].max())
        assert axes.get_ylabel()
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "log", "linear"]


def test_a_run_that_is_not_finite_leaves_no_mean_and_is_counted():
    figure = signal_propagation_over_depth(signal(nan_run=("SM+G", 1)))
    for axes in figure.axes:
        assert np.isnan(lines(axes)["SM+G (1 of 3 not finite)"].get_ydata()).all()
        thin = [line for line in axes.lines if line.get_linewidth() == 0.5 and np.isfinite(line.get_ydata()).all()]
        assert len(thin) == 2
        assert np.isfinite(lines(axes)["SM+LN+G"].get_ydata()).all()


def test_dynamics_show_the_last_and_the_largest_layer_by_step():
    frame = dynamics(nan_run=("SM+LN+G", 0), nan_from=300)
    figure = signal_propagation_dynamics(frame)
    of_sm_g = frame[frame["configuration"] == "SM+G"]
    last = of_sm_g[of_sm_g["layer"] == 2].groupby("step")
    largest = of_sm_g.groupby(["step", "seed"])[list(SIGNAL_STATISTICS)].max().groupby("step")
    for above, below, name in zip(figure.axes[:4], figure.axes[4:], PANELS, strict=True):
        np.testing.assert_allclose(lines(above)["SM+G"].get_ydata(), last[name].mean())
        np.testing.assert_allclose(lines(below)["SM+G"].get_ydata(), largest[name].mean())
        for axes in (above, below):
            broken = lines(axes)["SM+LN+G (1 of 3 not finite)"].get_ydata()
            assert np.isfinite(broken).tolist() == [True, True, True, False, False]


def test_a_figure_of_one_seed_has_no_band_and_one_of_nan_can_be_drawn():
    figure = signal_propagation_over_depth(signal(seeds=(0,)))
    assert not any(axes.collections for axes in figure.axes)
    nothing = signal(seeds=(0,))
    nothing[list(SIGNAL_STATISTICS)] = np.nan
    signal_propagation_over_depth(nothing).canvas.draw()


def test_outlier_tables_are_means_with_t_intervals():
    frame = signal()
    table = outlier_table(frame, layer="last").set_index("Configuration")
    values = frame[(frame["configuration"] == "SM+G") & (frame["layer"] == 2)]["residual_kurtosis"]
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert table.loc["SM+G", "Kurtosis"] == f"{values.mean():.2f} ± {half:.2f}"
    assert table["Seeds"].tolist() == [3, 3]
    largest = outlier_table(frame, layer="largest").set_index("Configuration")
    values = frame[frame["configuration"] == "SM+G"].groupby("seed")["residual_rms"].max()
    assert largest["RMS"]["SM+G"].startswith(f"{values.mean():.2f} ± ")
    broken = outlier_table(signal(nan_run=("SM+G", 1)), layer="largest").set_index("Configuration")
    assert (broken.loc["SM+G", ["RMS", "Kurtosis", "Max/median", "Token cosine"]] == "NaN").all()


def quantization(ppl):
    run = {"model": "tiny", "context_length": 16, "configuration": "SM+G"}
    return pd.DataFrame(
        [
            {
                **run,
                "seed": seed,
                "precision": precision,
                "eval_loss": np.log(value),
                "eval_ppl": value,
                "increase_percent": 100 * (value / values[0] - 1),
            }
            for seed, values in enumerate(ppl)
            for precision, value in zip(
                ("full_precision", "int8_weights", "int8_weights_activations"), values, strict=True
            )
        ]
    )


def test_the_increase_is_taken_within_a_run():
    table = quantization_table(quantization([(100.0, 101.0, 90.0), (200.0, 206.0, 220.0)]))
    row = table.iloc[0]
    assert row["Perplexity, full precision"].startswith("150.0 ± ")
    assert row["int8 weights, Δ %"].startswith("+2.00 ± ")  # of +1 % and +3 %
    assert row["int8 weights and activations, Δ %"].startswith("0.00 ± ") is False
    assert row["int8 weights and activations, Δ %"].startswith("+0.00 ± ")  # of -10 % and +10 %
    one_seed = quantization_table(quantization([(100.0, 101.0, 1234.5)])).iloc[0]
    assert one_seed["int8 weights and activations"] == "1,234"
    assert one_seed["int8 weights, Δ %"] == "+1.00"
    diverged = quantization_table(quantization([(100.0, 101.0, 90.0), (np.nan,) * 3])).iloc[0]
    assert (diverged.iloc[2:] == "NaN").all()


def test_bad_frames_are_refused():
    with pytest.raises(InputError, match="lacks token_cosine_similarity"):
        signal_propagation_over_depth(signal().drop(columns="token_cosine_similarity"))
    with pytest.raises(InputError, match="more than one row"):
        outlier_table(pd.concat([signal(), signal()]), layer="last")
    with pytest.raises(InputError, match="mixes several models"):
        signal_propagation_dynamics(pd.concat([dynamics(), dynamics().assign(model="other")]))
