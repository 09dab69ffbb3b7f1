"""The penalty and its gradients in float64, and what a run with it learns, records, saves and goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from normfree import NormfreeForCausalLM
from normfree.data import PackedData
from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.probes import EntropyRecorder
from normfree.training import RunConfig, RunResult, load_run_config, train
from normfree.training.objectives.entropy_regularization import EntropyRegularizationOptions, entropy_penalty
from normfree.training.objectives.objective import OBJECTIVE_FILE
from normfree.training.records import LAYERS_FILE, METRICS_FILE
from normfree.training.run_folder import last_checkpoint

from ..test_telemetry import BatchLog, eager_entropy
from ..test_trainer import StopAt, assert_same, final_weights

Make = Callable[..., RunConfig]
BOUND = np.log(np.arange(1, 17)).mean()
"""Of uniform causal attention over the 16 tokens of a tiny run, in nats."""


def regularized(run: RunConfig, **options: Any) -> RunConfig:
    content = {**run.model_dump(), "objective": {"kind": "entropy_regularization", **options}}
    return RunConfig.model_validate(content)


def metric(result: RunResult, name: str) -> list[float]:
    metrics = pd.read_parquet(result.folder / METRICS_FILE)
    return metrics[metrics["name"] == name]["value"].tolist()


def thresholds(result: RunResult) -> torch.Tensor:
    checkpoint = last_checkpoint(result.folder)
    assert checkpoint is not None
    return load_file(checkpoint / OBJECTIVE_FILE)["entropy_thresholds"]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    maximum=st.floats(0.1, 8.0),
    tolerance=st.floats(0.0, 0.9),
)
def test_the_penalty_is_the_papers_in_float64(seed: int, maximum: float, tolerance: float) -> None:
    generator = np.random.default_rng(seed)
    entropy, shares = generator.uniform(0, maximum, (3, 2, 4)), generator.uniform(0, 1, (2, 4))
    expected = 0.0
    for layer in range(2):
        for head in range(4):
            for sequence in range(3):
                deviation = entropy[sequence, layer, head] - shares[layer, head] * maximum
                if abs(deviation) > tolerance * maximum:
                    expected += deviation**2 / 24
    ours = entropy_penalty(torch.tensor(entropy), torch.tensor(shares), maximum=maximum, tolerance=tolerance)
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-12)


def test_the_gradient_of_the_thresholds_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = 3 * torch.rand(3, 2, 4, generator=generator, dtype=torch.float64)
    shares = torch.rand(2, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def penalty(given_shares: torch.Tensor) -> torch.Tensor:
        return entropy_penalty(entropy, given_shares, maximum=3.0, tolerance=0.2)

    assert torch.autograd.gradcheck(penalty, shares)


def test_a_nan_entropy_is_not_hidden_by_the_margin() -> None:
    entropy = torch.ones(1, 1, 2)
    entropy[0, 0, 0] = torch.nan
    assert entropy_penalty(entropy, torch.full((1, 2), 0.5), maximum=2.0, tolerance=0.2).isnan()


def test_the_gradient_of_the_query_and_key_weights_is_that_of_a_materialised_softmax() -> None:
    """One attention layer written out in float64: scores, softmax, entropy, penalty, all by autograd."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 40}
    model = NormfreeForCausalLM.config_class(**sizes, norm="layernorm", activation="gelu", initializer_range=0.3)
    student = NormfreeForCausalLM(model)
    tokens = torch.randint(0, 40, (4, 16))
    shares = torch.tensor([[0.2, 0.9]])
    with EntropyRecorder(student) as recorded:
        student(tokens)
    entropy_penalty(recorded.per_head(), shares, maximum=float(BOUND), tolerance=0.1).backward()

    block = student.model.blocks[0]
    with torch.no_grad():
        embedded = student.model.embed_tokens(tokens) + student.model.embed_positions(torch.arange(16))
        x = block.attention_norm(embedded.float()).double()
    weights = {name: getattr(block.attention, name).weight.detach().double().requires_grad_() for name in NAMES}
    biases = {name: getattr(block.attention, name).bias.detach().double() for name in NAMES}
    q, k = ((x @ weights[name].T + biases[name]).view(4, 16, 2, 8).transpose(1, 2) for name in NAMES)
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    p = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    entropy = -(p * p.masked_fill(hidden, 1.0).log()).sum(dim=-1).mean(dim=-1)
    deviation = entropy - shares[0].double() * BOUND
    (deviation**2 * (deviation.abs() > 0.1 * BOUND)).mean().backward()
    for name in NAMES:
        expected = weights[name].grad
        assert expected is not None
        assert expected.norm() > 1e-3
        error = (getattr(block.attention, name).weight.grad.double() - expected).norm() / expected.norm()
        assert error <= 1e-5, (name, error)


NAMES = ("q_proj", "k_proj")


def test_a_run_minimises_cross_entropy_and_the_penalty(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    """An independent loop, written out, gives the same losses and thresholds."""
    run, batches = regularized(tiny_run(steps=4, learning_rate=0.01), weight=2.0, tolerance=0.1), BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))

    torch.manual_seed(run.seed)
    model = NormfreeForCausalLM(run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id))
    shares = torch.nn.Parameter(torch.full((2, 2), 0.5))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [*(p for p in model.parameters() if p.dim() == 1), shares], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    expected: dict[str, list[float]] = {"train_loss": [], "cross_entropy_nats": [], "entropy_penalty": []}
    for step, batch in enumerate(batches.batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (0 if step == 0 else (4 - step) / 3)
        with EntropyRecorder(model) as recorded:
            logits = model(batch).logits
        cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        deviation = recorded.per_head() - shares * BOUND
        penalty = (deviation**2 * (deviation.abs() > 0.1 * BOUND)).mean()
        loss = cross_entropy + 2.0 * penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in zip(expected, (loss, cross_entropy, penalty), strict=True):
            expected[name].append(value.item())
    for name, values in expected.items():
        np.testing.assert_allclose(metric(result, name), values, rtol=2e-5)
    np.testing.assert_allclose(thresholds(result), shares.detach(), rtol=1e-5)
    assert (thresholds(result) != 0.5).all()


def test_evaluation_is_plain_cross_entropy(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    """At a learning rate that moves nothing, a heavily penalised model evaluates like one never penalised."""
    still = tiny_run(learning_rate=1e-30, weight_decay=0.0)
    plain = train(still, data, tmp_path / "plain")
    penalised = train(regularized(still, weight=100.0, tolerance=0.0), data, tmp_path / "penalised")
    assert penalised.row["eval_loss"] == plain.row["eval_loss"]
    assert metric(penalised, "eval_loss") == metric(plain, "eval_loss")
    assert metric(penalised, "cross_entropy_nats") == metric(plain, "train_loss")
    assert metric(penalised, "train_loss")[0] > 10 + metric(plain, "train_loss")[0]
    assert metric(plain, "cross_entropy_nats") == []


def test_thresholds_are_recorded_for_every_head(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    result = train(regularized(tiny_run(), tolerance=0.0, initial_threshold=0.25), data, tmp_path / "run")
    layers = pd.read_parquet(result.folder / LAYERS_FILE).query("name == 'entropy_threshold_nats'")
    assert sorted(set(layers["step"])) == [0, 2, 4, 6]
    assert (layers.groupby("step").size() == 4).all()
    assert layers.groupby("step")[["layer", "head"]].agg(["min", "max"]).to_numpy().tolist() == [[0, 1, 0, 1]] * 4
    np.testing.assert_allclose(layers.query("step == 0")["value"], 0.25 * BOUND, rtol=1e-6)
    final = layers.query("step == 6").sort_values(["layer", "head"])["value"]
    np.testing.assert_allclose(final, BOUND * thresholds(result).flatten(), rtol=1e-6)
    assert uniform_entropy_bound(16) == pytest.approx(BOUND)


@pytest.mark.parametrize("stop", [4, 5])
def test_a_stopped_run_ends_like_one_never_stopped(data: PackedData, tiny_run: Make, tmp_path: Path, stop: int) -> None:
    run = regularized(tiny_run(model={"embedding_dropout": 0.1}, telemetry_steps=1), tolerance=0.0)
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(StopAt(stop),))
    resumed = train(run, data, tmp_path / "stopped")
    assert_same(whole, resumed)
    assert torch.equal(thresholds(whole), thresholds(resumed))


@pytest.mark.parametrize("changed", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
def test_how_a_step_is_computed_changes_nothing(
    data: PackedData, tiny_run: Make, tmp_path: Path, changed: dict[str, Any]
) -> None:
    def trained(place: str, **recipe: Any) -> RunResult:
        run = tiny_run(steps=4, learning_rate=0.01, batch_size=8, **{"micro_batch_size": 8, **recipe})
        return train(regularized(run, weight=2.0, tolerance=0.1), data, tmp_path / place)

    first, second = trained("first"), trained("second", **changed)
    for name in ("train_loss", "cross_entropy_nats", "entropy_penalty", "grad_norm"):
        np.testing.assert_allclose(metric(first, name), metric(second, name), rtol=1e-5)
    np.testing.assert_allclose(thresholds(first), thresholds(second), rtol=1e-5)


def test_it_trains_in_bf16(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    result = train(regularized(tiny_run(precision="bf16"), weight=1.0), data, tmp_path / "run")
    exact = train(regularized(tiny_run(), weight=1.0), data, tmp_path / "exact")
    np.testing.assert_allclose(metric(result, "entropy_penalty"), metric(exact, "entropy_penalty"), rtol=0.02)
    assert thresholds(result).dtype == torch.float32


def test_the_model_on_disk_has_no_thresholds(
    plain_run: RunResult, data: PackedData, tiny_run: Make, tmp_path: Path
) -> None:
    result = train(regularized(tiny_run()), data, tmp_path / "run")
    weights = [final_weights(each) for each in (plain_run, result)]
    assert weights[0].keys() == weights[1].keys()
    assert result.row["n_parameters"] == plain_run.row["n_parameters"]


def test_the_entropy_at_the_start_is_what_the_probe_reads(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    run, batches = regularized(tiny_run(batch_size=1, micro_batch_size=1), tolerance=0.0), BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))
    config = run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id)
    entropy = eager_entropy(config, run.seed, batches.batches[0])
    expected = ((entropy - 0.5 * BOUND) ** 2).mean()
    assert metric(result, "entropy_penalty")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight: Input should be greater than 0"),
        ({"weight": float("inf")}, "weight: Input should be a finite number"),
        ({"tolerance": -0.1}, "tolerance: Input should be greater than or equal to 0"),
        ({"tolerance": 0.5}, "tolerance 0.5 means no penalty"),
        ({"initial_threshold": 1.5}, "initial_threshold: Input should be less than or equal to 1"),
        ({"wieght": 1.0}, r"unknown option 'wieght' \(did you mean 'weight'\?\)"),
        ({"kind": "entropy_regularisation"}, r"unknown kind of objective .*did you mean 'entropy_regularization'"),
        ({"kind": None}, "unknown kind of objective None; allowed: entropy_regularization, distillation"),
    ],
)
def test_options_that_mean_nothing_are_refused(tiny_run: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        regularized(tiny_run(), **options)


def test_a_mistake_in_a_file_is_one_line(tiny_run: Make, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(regularized(tiny_run()).to_yaml({}).replace("tolerance:", "tolerence:"))
    with pytest.raises(InputError, match=r"entropy_regularization: unknown option 'tolerence' \(did you") as error:
        load_run_config(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_compiled_code_shows_no_entropy(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set recipe\.torch_compile to false"):
        train(regularized(tiny_run(torch_compile=True)), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_objective_is_refused(data: PackedData, tiny_run: Make, tmp_path: Path) -> None:
    train(regularized(tiny_run(steps=1)), data, tmp_path / "run")
    with pytest.raises(InputError, match=r"objective.weight: 0.1 there, 0.2 asked for"):
        train(regularized(tiny_run(steps=1), weight=0.2), data, tmp_path / "run")
    with pytest.raises(InputError, match=r"objective: .* there, None asked for"):
        train(tiny_run(steps=1), data, tmp_path / "run")


def test_options_read_back_as_they_were_written(tiny_run: Make) -> None:
    run = regularized(tiny_run(), weight=3.0)
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run
    assert run.objective == EntropyRegularizationOptions(weight=3.0)
    assert "objective" not in tiny_run().to_yaml({})
