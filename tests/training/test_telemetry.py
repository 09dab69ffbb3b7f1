import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.probes import EntropyProbe
from normfree.probes.residual_stream import ResidualStreamProbe
from normfree.training import Callback, RunConfig, RunResult, RunState, train
from normfree.training.nonfinite import all_finite
from normfree.training.records import LAYERS_FILE, METRICS_FILE
from normfree.training.run_folder import last_checkpoint


class BatchLog(Callback):
    """The token ids of every forward pass in training mode."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def begin(self, run: RunState) -> None:
        def log(module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            if module.training:
                self.batches.append(options["input_ids"].clone())

        run.model.register_forward_pre_hook(log, with_kwargs=True)


def layers_of(folder: Path, name: str) -> pd.DataFrame:
    layers = pd.read_parquet(folder / LAYERS_FILE)
    return layers[layers["name"] == name]


def eager_entropy(config: NormfreeConfig, seed: int, batch: torch.Tensor) -> np.ndarray:
    """Eq. 8 in float64 from the attention weights of the freshly initialised model: [n_layer, n_head]."""
    set_seed(seed)
    model = NormfreeForCausalLM(config).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(batch, output_attentions=True).attentions
    weights = np.stack([each.double().numpy() for each in attentions])
    logs = np.log(np.where(weights > 0, weights, 1.0))
    return -(weights * logs).sum(axis=-1).mean(axis=(1, 3))


def test_entropy_at_initialisation_is_the_uniform_bound() -> None:
    config = NormfreeConfig(vocab_size=512, n_layer=3, n_head=4, n_embd=128, n_positions=128, norm="none")
    torch.manual_seed(0)
    model = NormfreeForCausalLM(config)
    with EntropyProbe(model) as probe, torch.no_grad():
        model(torch.randint(0, 512, (4, 128)))
    bound = np.log(np.arange(1, 129)).mean()
    assert bound == pytest.approx(3.878, abs=5e-4)
    assert probe.per_head().shape == (3, 4)
    assert (probe.per_head() - bound).abs().max() < 0.01


def test_recorded_entropy_is_that_of_the_training_batches(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run, batches = tiny_run(model={"initializer_range": 0.35, "norm": "none"}, batch_size=8), BatchLog()
    train(run, data, tmp_path / "run", callbacks=(batches,))
    recorded = layers_of(tmp_path / "run", "entropy_nats")
    assert recorded["step"].unique().tolist() == [0, 2, 4]

    # A step is two micro-batches; all their sequences count.
    first_step = torch.cat(batches.batches[:2])
    assert first_step.shape == (8, 16)
    vocab_size, eos = data.statistics["vocab_size"], data.tokenizer.eos_token_id
    expected = eager_entropy(run.build_model_config(vocab_size, eos), run.seed, first_step)
    at_start = recorded[recorded["step"] == 0].sort_values(["layer", "head"])["value"].to_numpy().reshape(2, 2)
    np.testing.assert_allclose(at_start, expected, atol=1e-5)
    assert expected.std() > 0.01  # attention is not uniform here, so the comparison says something


def test_evaluation_passes_are_not_recorded(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    often = train(tiny_run(eval_steps=1), data, tmp_path / "often")
    seldom = train(tiny_run(eval_steps=6), data, tmp_path / "seldom")
    for name in ("entropy_nats", "residual_rms", "scores_nan_count"):
        columns = ["step", "layer", "head", "value"]
        pd.testing.assert_frame_equal(
            layers_of(often.folder, name)[columns].reset_index(drop=True),
            layers_of(seldom.folder, name)[columns].reset_index(drop=True),
        )


def test_learned_slopes_are_recorded(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = tiny_run(model={"activation": ["gelu", "learnable_leaky_relu"], "negative_slope": 0.25})
    train(run, data, tmp_path / "run")
    slopes = layers_of(tmp_path / "run", "negative_slope")
    assert slopes[["step", "layer"]].to_numpy().tolist() == [[0, 1], [2, 1], [4, 1], [6, 1]]
    assert slopes["value"].iloc[0] == 0.25
    assert slopes["value"].iloc[2] != 0.25
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    final = load_file(checkpoint / "model.safetensors")
    assert slopes["value"].iloc[3] == final["model.blocks.1.ffn.activation.negative_slope"].item()
    assert slopes["head"].isna().all()


def test_metrics_hold_losses_rates_norms_and_speed(plain_run: RunResult) -> None:
    metrics = pd.read_parquet(plain_run.folder / METRICS_FILE)
    steps = metrics.groupby("name")["step"].apply(list).to_dict()
    every = [1, 2, 3, 4, 5, 6]
    assert {name: steps[name] for name in ("train_loss", "grad_norm", "learning_rate", "tokens_per_second")} == {
        "train_loss": every,
        "grad_norm": every,
        "learning_rate": every,
        "tokens_per_second": every,
    }
    assert steps["eval_loss"] == [3, 6]
    assert (metrics["tokens"] == metrics["step"] * 64).all()
    assert metrics["wall_seconds"].is_monotonic_increasing
    assert (metrics[metrics["name"] == "tokens_per_second"]["value"] > 0).all()


def small_model(**options: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    return NormfreeForCausalLM(
        NormfreeConfig(vocab_size=50, n_layer=3, n_head=2, n_embd=8, n_positions=8, norm="none", **options)
    )


def test_residual_rms_is_the_root_mean_square_of_each_blocks_output() -> None:
    model, tokens = small_model(initializer_range=0.3), torch.arange(16).view(2, 8)
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        # The last hidden state that transformers returns is behind the final norm.
        states = model(tokens, output_hidden_states=True).hidden_states[1:-1]
    expected = [math.sqrt((state.double().numpy() ** 2).mean()) for state in states]
    np.testing.assert_allclose(probe.rms()[:2].numpy(), expected, rtol=1e-6)


def test_nan_and_inf_in_the_residual_stream_are_counted_by_layer() -> None:
    model, tokens = small_model(), torch.arange(16).view(2, 8)
    with torch.no_grad():
        model.model.blocks[1].ffn.down_proj.bias[3] = math.inf
        model.model.blocks[2].ffn.down_proj.bias[5] = math.nan
    with ResidualStreamProbe(model) as probe, torch.no_grad():
        model(tokens)
    assert probe.inf[:2].tolist() == [0, 16]
    assert probe.nan[:2].tolist() == [0, 0]
    assert probe.nan[2] > 0
    assert probe.rms()[1].item() == math.inf
    assert math.isnan(probe.rms()[2].item())


def test_a_probe_leaves_nothing_on_the_model() -> None:
    model = small_model()
    with ResidualStreamProbe(model) as probe:
        pass
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
    assert probe.elements.tolist() == [0, 0, 0]


def test_all_finite_sees_one_bad_parameter() -> None:
    model = small_model()
    assert all_finite(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert not all_finite(model)


def test_outliers_of_the_residual_stream_are_recorded_from_the_training_batches(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run, batches = tiny_run(model={"initializer_range": 0.35, "norm": "none"}, batch_size=8), BatchLog()
    train(run, data, tmp_path / "run", callbacks=(batches,))
    first_step = torch.cat(batches.batches[:2])
    config = run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id)
    set_seed(run.seed)
    with torch.no_grad():
        states = NormfreeForCausalLM(config).double()(first_step, output_hidden_states=True).hidden_states
    x = states[1].numpy()  # after the first block
    channel_squares = (x**2).mean(axis=(0, 1))
    units = x / np.linalg.norm(x, axis=-1, keepdims=True)
    gram = units @ units.transpose(0, 2, 1)
    n_token = x.shape[1]
    magnitudes = np.sort(np.abs(x), axis=-1)
    expected = {
        "residual_rms": np.sqrt(channel_squares.mean()),
        "residual_kurtosis": (channel_squares**2).mean() / channel_squares.mean() ** 2,
        "residual_max_over_median": (magnitudes[..., -1] / magnitudes[..., x.shape[-1] // 2 - 1]).mean(),
        "token_cosine_similarity": ((gram.sum(axis=(1, 2)) - n_token) / (n_token * (n_token - 1))).mean(),
    }
    for name, value in expected.items():
        recorded = layers_of(tmp_path / "run", name)
        assert recorded["step"].unique().tolist() == [0, 2, 4]
        assert recorded["head"].isna().all()
        at_start = recorded[(recorded["step"] == 0) & (recorded["layer"] == 0)]["value"]
        np.testing.assert_allclose(at_start, [value], rtol=1e-5, err_msg=name)
