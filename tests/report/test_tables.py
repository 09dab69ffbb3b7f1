import io
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from normfree.errors import InputError
from normfree.report import formatted, load_published, perplexity_table, table_notes, to_console, to_markdown

from . import study


def _table(seeds=(0,), nan_run=None, **options):
    losses = study.sequence_losses(seeds, nan_run)
    return perplexity_table(study.results(losses), study.head_entropy(seeds=seeds, nan_run=nan_run), losses, **options)


def _gpt2():
    return load_published("relu_revival_table2").query("model == 'GPT-2'")


def test_three_seeds_against_scipy():
    losses = study.sequence_losses((0, 1, 2))
    results = study.results(losses)
    table = _table((0, 1, 2)).set_index("configuration")
    perplexity = {
        name: runs.sort_values("seed")["eval_ppl"].to_numpy() for name, runs in results.groupby("configuration")
    }
    delta = 100 * (perplexity["SM+G"] / perplexity["SM+LN+G"] - 1)
    row = table.loc["SM+G"]
    for name, values in (("eval_ppl", perplexity["SM+G"]), ("delta_percent", delta)):
        reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert row[name] == pytest.approx(values.mean(), rel=1e-10)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((reference.low, reference.high), rel=1e-9)
    assert row["loss_difference_over"] == "seeds"
    assert row["loss_difference"] == pytest.approx(row["eval_loss"] - table.loc["SM+LN+G", "eval_loss"], rel=1e-9)
    assert table["seeds"].tolist() == [3] * 4
    assert table.index.tolist() == list(study.CONFIGURATIONS)


def test_one_seed():
    table = _table().set_index("configuration")
    assert table["eval_ppl_low"].isna().all()
    assert table.loc["SM+R", "loss_difference_over"] == "sequences"
    low, mean, high = table.loc["SM+R", ["loss_difference_low", "loss_difference", "loss_difference_high"]]
    assert low < mean < high
    assert mean == pytest.approx(table.loc["SM+R", "eval_loss"] - table.loc["SM+LN+G", "eval_loss"])
    baseline = table.loc["SM+LN+G"]
    assert baseline["loss_difference_over"] == "baseline"
    assert (
        baseline[["delta_percent", "delta_percent_low", "loss_difference", "loss_difference_high"]].tolist() == [0] * 4
    )


def test_bands_are_means_over_seeds_of_shares():
    table = _table((0, 1)).set_index("configuration")
    entropy = study.head_entropy(seeds=(0, 1))
    shares = []
    for _, run in entropy.groupby("seed"):
        edges = np.array([0, 0.25, 0.5, 0.75, 1]) * run["entropy_nats"].max()
        counts, _ = np.histogram(run.loc[run["configuration"] == "SM+G", "entropy_nats"], edges)
        shares.append(counts / 24)
    bands = table.loc["SM+G", ["band_1", "band_2", "band_3", "band_4"]].tolist()
    assert bands == pytest.approx(np.mean(shares, axis=0).tolist())


def test_a_diverged_run_is_nan_everywhere_it_counts():
    row = _table((0, 1, 2), ("SM+G", 2)).set_index("configuration").loc["SM+G"]
    assert (row["seeds"], row["diverged"], row["nan_heads"]) == (3, 1, 24)
    for name in ("eval_loss", "eval_ppl", "eval_ppl_low", "delta_percent", "loss_difference", "band_1", "band_4"):
        assert math.isnan(row[name]), name


def test_a_diverged_run_without_sequence_losses_does_not_vanish():
    losses = study.sequence_losses((0, 1, 2), ("SM+G", 2))
    kept = losses[losses["loss_nats"].notna()]
    entropy = study.head_entropy(seeds=(0, 1, 2))
    table = perplexity_table(study.results(losses), entropy, kept).set_index("configuration")
    assert math.isnan(table["loss_difference"]["SM+G"])
    assert math.isfinite(table["loss_difference"]["SM+R"])


def test_published_numbers_are_matched_by_configuration():
    table = _table(published=_gpt2().iloc[1:]).set_index("configuration")
    assert table.loc["SM+G", ["published_ppl", "published_delta_percent"]].tolist() == [3.197, 18.92]
    assert math.isnan(table.loc["SM+LN+G", "published_ppl"])
    with pytest.raises(InputError, match="more than one row for configuration"):
        _table(published=load_published("relu_revival_table2"))


def test_several_models():
    losses = study.sequence_losses()
    names = ("tiny", "other")
    results = pd.concat([study.results(losses).assign(model=name) for name in names])
    entropy = pd.concat([study.head_entropy().assign(model=name) for name in names])
    with pytest.raises(InputError, match="needs the columns model and context_length"):
        perplexity_table(results, entropy, losses)
    table = perplexity_table(results, entropy, pd.concat([losses.assign(model=n, context_length=128) for n in names]))
    assert table["model"].tolist() == ["tiny"] * 4 + ["other"] * 4
    assert formatted(table).columns[:2].tolist() == ["Model", "T"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, h, s: (r.assign(status="done"), h, s), "unknown status in the results frame 'done'"),
        (lambda r, h, s: (r[r["configuration"] != "SM+LN+G"], h, s), "unknown baseline configuration"),
        (lambda r, h, s: (r, h[h["configuration"] != "SM+G"], s), "no rows for 'SM\\+G'"),
        (lambda r, h, s: (r, h, s[s["configuration"] != "SM+G"]), "no rows for 'SM\\+G'"),
        (lambda r, h, s: (pd.concat([r, r]), h, s), "more than one row for model tiny"),
        (lambda r, h, s: (r.iloc[:0], h, s), "results frame has no rows"),
    ],
)
def test_bad_frames(change, message):
    losses = study.sequence_losses()
    with pytest.raises(InputError, match=message):
        perplexity_table(*change(study.results(losses), study.head_entropy(), losses))


def _row(**changes):
    row = dict.fromkeys(_table().columns, 0.0) | {
        "model": "tiny", "context_length": 128, "configuration": "SM+G", "seeds": 3, "diverged": 0,
        "eval_loss": 5.063, "eval_ppl": 158.04, "eval_ppl_low": 156.04, "eval_ppl_high": 160.04,
        "delta_percent": -12.34, "delta_percent_low": -13.34, "delta_percent_high": -11.34,
        "loss_difference": 0.975, "loss_difference_low": 0.965, "loss_difference_high": 0.985,
        "loss_difference_over": "sequences", "band_4": 0.576, "published_ppl": 3.197, "published_delta_percent": 18.92,
    }  # fmt: skip
    return row | changes


def test_formatted_by_hand():
    shown = formatted(pd.DataFrame([_row(), _row(diverged=1, eval_ppl=float("nan"), published_ppl=float("nan"))]))
    assert shown.iloc[0].tolist() == [
        "SM+G", "3", "5.063", "158.0 ± 2.0", "\N{MINUS SIGN}12.3 ± 1.0", "+0.975 ± 0.010 †", "0.0", "0.0", "0.0",
        "57.6", "3.197 (+18.9)",
    ]  # fmt: skip
    assert list(shown.loc[1, ["Seeds", "Perplexity", "Published (Δ %)"]]) == ["2 of 3", "NaN", "\N{EN DASH}"]


def test_notes_say_what_the_interval_covers():
    assert any("evaluation sampling only" in note for note in table_notes(_table()))
    several = table_notes(_table((0, 1)))
    assert any("over seeds" in note for note in several)
    assert not any("evaluation sampling only" in note for note in several)


@pytest.mark.parametrize(("seeds", "nan_run"), [((0,), None), ((0, 1, 2), ("SM+G", 2))])
def test_console_fits_100_columns_without_cutting(seeds, nan_run):
    output = io.StringIO()
    Console(file=output, width=100).print(to_console(_table(seeds, nan_run, published=_gpt2())))
    text = output.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "3.197 (+18.9)" in text
    for label in study.CONFIGURATIONS:
        assert f" {label} " in text
    assert ("NaN" in text) == (nan_run is not None)


def test_console_shows_markup_in_names_as_text():
    output = io.StringIO()
    Console(file=output, width=100).print(to_console(pd.DataFrame([_row(configuration="[red]x[/red]")])))
    assert "[red]x[/red]" in output.getvalue()


def test_markdown():
    lines = to_markdown(pd.DataFrame([_row(configuration="a|b <script>")])).splitlines()
    assert lines[0].startswith("| Configuration | Seeds | Loss, nats | Perplexity |")
    assert lines[1].startswith("| :--- | ---: |")
    assert lines[2].startswith("| a\\|b &lt;script&gt; | 3 | 5.063 | 158.0 ± 2.0 |")
    assert lines[0].count("|") == lines[1].count("|")
    assert lines[4].startswith("- ")
