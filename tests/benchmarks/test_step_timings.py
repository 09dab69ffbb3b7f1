"""``normfree bench training``, ``step-cost`` and ``norm-free-inference`` at sizes that take no time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normfree.benchmarks import norm_free_inference, step_cost, training

Command = Callable[..., tuple[int, str, str]]
TINY = ("--layers", 1, "--heads", 1, "--tokens", 8, "--batch", 1, "--rounds", 2)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training, step_cost, norm_free_inference):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))


def found(command: Command, *arguments: object) -> dict[str, Any]:
    code, out, err = command("bench", *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert result["command"].startswith(f"normfree bench {arguments[0]} ")
    assert result["device"] == "CPU, 1 threads"
    assert result["torch"] == torch.__version__
    return result


def test_training(normfree: Command) -> None:
    options = ("--preset", "smoke", "--rounds", 1, "--steps", 1, "--peak-size", 64)
    result = found(normfree, "training", *options, "--out", "t.json")
    assert json.loads(Path("t.json").read_text()) == result
    assert (result["precision"], result["attn_implementation"]) == ("fp32", "sdpa")
    speeds = result["tokens_per_second"]
    assert list(speeds) == [
        "normfree",
        "normfree + telemetry",
        "Hugging Face sdpa",
        "Hugging Face eager + entropy",
    ]
    # one round: every ratio is that of the two speeds
    ratio = speeds["normfree"] / speeds["Hugging Face sdpa"]
    assert result["normfree_against_hugging_face_sdpa"] == pytest.approx(ratio, abs=1e-3)
    overhead = speeds["normfree"] / speeds["normfree + telemetry"] - 1
    assert result["telemetry_overhead_every_step"] == pytest.approx(overhead, abs=1e-3)
    assert result["telemetry_overhead_every_100_steps"] == pytest.approx(overhead / 100, abs=2e-5)
    assert 0 < result["share_of_measured_matmul_peak"] < 1
    assert "normfree_against_one_thread" not in result
    assert (result["sequences"], result["tokens"]) == (8, 32)
    peak, peak_of_hugging_face = result["peak_mib"]["normfree"], result["peak_mib"]["Hugging Face sdpa"]
    assert 0 < peak < peak_of_hugging_face
    assert result["peak_memory_over_hugging_face"] == pytest.approx(peak / peak_of_hugging_face, abs=0.05)
    assert result["processor"]


def test_training_on_longer_sequences_and_two_threads(normfree: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_peak_memory", lambda *_: {})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        options = ("--preset", "smoke", "--rounds", 1, "--steps", 1, "--peak-size", 64, "--tokens", 64)
        code, out, err = normfree("bench", "training", *options, "--json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert code == 0, err
    result = json.loads(out)
    speeds = result["tokens_per_second"]
    assert result["normfree_against_one_thread"] == pytest.approx(
        speeds["normfree"] / speeds["normfree, one thread"], abs=1e-3
    )
    assert (result["sequences"], result["tokens"]) == (4, 64)


def test_the_operations_of_a_token() -> None:
    from normfree import NormfreeConfig, NormfreeForCausalLM

    config = NormfreeConfig(vocab_size=10, n_positions=4, n_layer=2, n_head=1, n_embd=8, n_inner=16)
    # a layer: 4 · 8² in attention, 2 · 8 · 16 in the feed-forward network; 10 · 8 in the tied unembedding
    weights = 2 * (4 * 64 + 2 * 128) + 80
    expected = 6 * weights + 6 * 2 * 8 * 4
    assert training._flops_per_token(NormfreeForCausalLM(config)) == expected


def test_training_as_a_table(normfree: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_peak_memory", lambda *_: {})
    code, out, err = normfree("bench", "training", "--preset", "smoke", "--rounds", 1, "--steps", 1, "--peak-size", 64)
    assert (code, err) == (0, "")
    assert "Hugging Face eager + entropy" in out
    assert "telemetry overhead every 100 steps" in out
    assert "CPU, 1 threads, torch" in out


@pytest.mark.parametrize(
    ("group", "usual", "other"), [("norms", "pre, rmsnorm", "hybrid, rmsnorm"), ("spark", "dense", "spark ffn")]
)
def test_step_cost(normfree: Command, group: str, usual: str, other: str) -> None:
    result = found(normfree, "step-cost", group, *TINY, "--vocabulary", 16, "--only", other)
    assert result["shape"] == {"layers": 1, "heads": 1, "tokens": 8, "batch": 1, "vocabulary": 16}
    assert (result["dtype"], result["compiled"]) == ("fp32", False)
    ratios = result[f"step_time_over_{usual}"]
    assert list(ratios) == list(result["milliseconds"]) == [usual, other]
    assert all(each > 0 for each in result["milliseconds"].values())
    low, high = result["middle_half_of_the_rounds"][other]
    assert low <= ratios[other] <= high
    assert ratios[usual] == 1.0
    assert result["middle_half_of_the_rounds"][usual] == [1.0, 1.0]


def test_every_variant_of_step_cost_can_be_built(normfree: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs once; how long it takes is not asked."""

    def once(calls: dict[str, Callable[[], Any]], *_: object) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [float(i + 1)] * 2 for i, name in enumerate(calls)}

    monkeypatch.setattr(step_cost, "interleaved", once)
    for group, (variants, _) in step_cost.GROUPS.items():
        usual = next(iter(variants))
        result = found(normfree, "step-cost", group, *TINY, "--layers", 2, "--vocabulary", 16)
        expected = {name: float(i + 1) for i, name in enumerate(variants)}
        assert result[f"step_time_over_{usual}"] == expected


def test_the_quartiles_of_a_ratio() -> None:
    # ratios 1, 2, 3: with n + 1 = 4 parts the quartiles are the first and the third
    assert step_cost._interval([2.0, 2.0, 9.0], [2.0, 1.0, 3.0]) == [1.0, 3.0]


def test_norm_free_inference(normfree: Command) -> None:
    Path("n.json").write_text("an older result")
    result = found(normfree, "norm-free-inference", *TINY, "--out", "n.json")
    assert json.loads(Path("n.json").read_text()) == result
    assert result["shape"] == {"layers": 1, "heads": 1, "tokens": 8, "batch": 1, "vocabulary": 50257}
    milliseconds = result["milliseconds"]
    assert set(milliseconds) == {f"{what}, {name}" for what in ("prefill", "decode") for name in MODELS}
    assert all(each > 0 for each in milliseconds.values())
    assert result["layernorm_time_over_norm_free"].keys() == {"prefill", "decode"}
    assert all(0 < share < 1 for share in result["norms_share_of_layernorm_time"].values())


def test_the_time_in_norms_is_that_of_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = norm_free_inference._models(3, 1, 8, 16)["LayerNorm"]
    clock = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    found = norm_free_inference._seconds_in_norms(model, lambda: model(input_ids=torch.zeros(1, 4, dtype=torch.long)))
    assert found == 7.0  # two norms a block and the last, each from one tick to the next
    assert not any("forward" in vars(module) for module in model.modules())


MODELS = ("LayerNorm", "norm-free")


def test_every_decoding_step_follows_the_same_prompt() -> None:
    model: Any = norm_free_inference._models(1, 1, 8, 16)["norm-free"].eval()
    lengths: list[int] = []
    decode = norm_free_inference._calls(model, 2, 8, compiled=False)["decode"]
    model.model.blocks[0].attention.register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(kwargs["cache"].get_seq_length()), with_kwargs=True
    )
    for _ in range(3):
        decode()
    assert lengths == [9, 9, 9]


def test_ratios_and_shares_of_made_up_times(normfree: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "prefill, LayerNorm": [6.0, 6.0],
        "decode, LayerNorm": [3.0, 3.0],
        "prefill, norm-free": [2.0, 4.0],
        "decode, norm-free": [2.0, 2.0],
    }

    def made_up(calls: dict[str, object], *_: object) -> dict[str, list[float]]:
        assert calls.keys() == seconds.keys()
        return dict(seconds)

    monkeypatch.setattr(norm_free_inference, "interleaved", made_up)
    monkeypatch.setattr(norm_free_inference, "_seconds_in_norms", lambda model, call: 0.6)
    result = found(normfree, "norm-free-inference", *TINY)
    assert result["milliseconds"] == {
        "prefill, LayerNorm": 6000.0,
        "decode, LayerNorm": 3000.0,
        "prefill, norm-free": 3000.0,
        "decode, norm-free": 2000.0,
    }
    assert result["layernorm_time_over_norm_free"] == {"prefill": 2.25, "decode": 1.5}
    assert result["norms_share_of_layernorm_time"] == {"prefill": 0.1, "decode": 0.2}
    _, out, _ = normfree("bench", "norm-free-inference", *TINY)
    assert [line.split() for line in out.splitlines() if "decode" in line] == [
        ["decode", "3000.000", "2000.000", "1.500", "20.0%"]
    ]
