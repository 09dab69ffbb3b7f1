from collections.abc import Callable
from pathlib import Path

from normfree.runner import load_preset, run_config
from normfree.studies.hybrid_activations import STUDY

Command = Callable[..., tuple[int, str, str]]


def test_every_split_point_of_both_orders_is_there() -> None:
    preset = load_preset("cpu")
    configurations = {each.label: each for each in STUDY.configurations(preset)}
    assert list(configurations) == [
        *("SM+G", "SM+R"),
        *("SM+G1R5", "SM+G2R4", "SM+G3R3", "SM+G4R2", "SM+G5R1"),
        *("SM+R1G5", "SM+R2G4", "SM+R3G3", "SM+R4G2", "SM+R5G1"),
    ]
    model = run_config(preset, configurations["SM+G2R4"], seed=0).build_model_config(512)
    assert model.activations == ["gelu", "gelu", "relu", "relu", "relu", "relu"]
    assert model.norm == "none"


def test_the_study_leaves_its_figures(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    code, out, err = normfree("study", "hybrid-activations", "--preset", preset_file, "--out", "study")
    assert code == 0, err
    assert "SM+R1G1" in out
    assert {path.name for path in (tmp_path / "study" / "figures").glob("*.png")} == {
        "split-point.png",
        "entropy-by-layer.png",
        "evaluation-loss.png",
    }
    page = (tmp_path / "study" / "report.html").read_text()
    assert "Lowest perplexity: " in page


def test_a_study_of_diverging_hybrids_ends_with_a_report(normfree: Command, preset_file: Path, tmp_path: Path) -> None:
    options = ("--set", "recipe.learning_rate=1e30", "--set", "recipe.warmup_ratio=0")
    code, _, err = normfree("study", "hybrid-activations", "--preset", preset_file, "--out", "study", *options)
    assert code == 0, err
    assert "diverged" in (tmp_path / "study" / "report.html").read_text()
