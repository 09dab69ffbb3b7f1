"""fp16 on a CPU: autocast, scaled losses, skipped updates and float32 master weights, as on CUDA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import set_seed

from normfree import NormfreeForCausalLM
from normfree.data import PackedData
from normfree.training import Callback, RunConfig, RunState, train
from normfree.training.half_precision import Float32Accumulation
from normfree.training.records import LAYERS_FILE
from normfree.training.run_folder import last_checkpoint

from .test_telemetry import BatchLog
from .test_trainer import StopAt, assert_same, final_weights, losses

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="where there is a GPU, fp16 is accelerate's")

FLOAT16_MAX = 65504.0
NORM_FREE = {"norm": "none", "activation": "leaky_relu", "negative_slope": 0.1}


class Overflowing(Callback):
    """Before chosen steps, makes the queries of the last layer so large that its scores overflow; undoes it after."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.weights: list[torch.Tensor] = []

    def begin_step(self, run: RunState) -> None:
        self._multiply(run.step, run.model, 2.0**20)

    def end_step(self, run: RunState) -> None:
        self._multiply(run.step - 1, run.model, 2.0**-20)
        self.weights.append(torch.cat([weight.detach().ravel().clone() for weight in run.model.parameters()]))

    def _multiply(self, step: int, model: Any, factor: float) -> None:
        if step in self.steps:
            with torch.no_grad():
                model.model.blocks[-1].attention.q_proj.weight.mul_(factor)


@pytest.fixture
def half_run(tiny_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(**recipe: Any) -> RunConfig:
        options = {"precision": "fp16", "attn_implementation": "eager", "telemetry_steps": 1, **recipe}
        return tiny_run("SM+L", model=NORM_FREE, **options)

    return make


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rounded_once_and_overflow_at_the_end_of_the_range(transposed: bool) -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.normal(size=shape).astype(np.float16) for shape in ((3, 5, 700), (3, 700, 4)))
    a[0, 0], b[0, :, 0] = 10.0, 10.0  # sums to 70,000, though no term is larger than 100
    a[1, 0], b[1, :, 1] = np.where(np.arange(700) < 350, 20.0, -20.0), 10.0  # passes 70,000 on the way to 0
    exact = a.astype(np.float64) @ b.astype(np.float64)
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    if transposed:
        right = right.mT.contiguous().mT
    with Float32Accumulation():
        ours = (left @ right).numpy()
    assert ours.dtype == np.float16
    assert ours[0, 0, 0] == np.inf
    assert ours[1, 0, 1] == 0.0
    finite = np.isfinite(ours)
    assert (~finite).sum() == (np.abs(exact) >= 65520).sum() == 1
    np.testing.assert_allclose(ours[finite], exact[finite], rtol=2.0**-11 * 1.01, atol=1e-4)


def test_gradients_of_a_product_are_rounded_to_float16_too() -> None:
    weight = torch.full((4, 300), 16.0, requires_grad=True)
    x = torch.full((2, 300), 16.0)
    with Float32Accumulation():
        with torch.autocast("cpu", dtype=torch.float16):
            y = torch.nn.functional.linear(x, weight)
        (300 * y.float()).sum().backward()
    assert y.dtype == torch.float16
    assert y.isinf().all()  # 300 · 256 = 76,800
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert (weight.grad == 2 * 300 * 16).all()


def test_training_is_autocast_with_a_scaled_loss(
    data: PackedData, half_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """An independent loop on torch's own float16 products gives the same losses, up to rounding."""
    run, batches = half_run(steps=8, warmup_ratio=0.25, learning_rate=0.01), BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))

    set_seed(run.seed)
    model = NormfreeForCausalLM(run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id))
    model.set_attn_implementation("eager")
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2]
    plain = [p for n, p in model.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    scaler = torch.amp.GradScaler("cpu")
    expected = []
    for step, batch in enumerate(batches.batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step / 2 if step < 2 else (8 - step) / 6)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(batch).logits
        assert logits.dtype == torch.float16
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    np.testing.assert_allclose(losses(result), expected, rtol=2e-4)
    single = train(half_run(steps=8, warmup_ratio=0.25, learning_rate=0.01, precision="fp32"), data, tmp_path / "fp32")
    assert losses(single) != losses(result)
    assert {weight.dtype for weight in final_weights(result).values()} == {torch.float32}


def test_overflowing_scores_are_counted_and_their_update_is_skipped(
    data: PackedData, half_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    overflowing = Overflowing(2, 3)
    result = train(half_run(warmup_ratio=0, save_steps=6), data, tmp_path / "run", callbacks=(overflowing,))

    layers = pd.read_parquet(result.folder / LAYERS_FILE)
    by_step = layers.pivot_table(index=["step", "layer"], columns="name", values="value", aggfunc="sum", dropna=False)
    assert (by_step.loc[[2, 3]].xs(1, level="layer")["scores_inf_count"] > 0).all()
    assert (by_step.loc[[2, 3]].xs(1, level="layer")["residual_nan_count"] > 0).all()
    others = by_step.drop(index=[(2, 1), (3, 1)])
    assert (others[[name for name in others.columns if name.endswith("_count")]] == 0).all(axis=None)
    assert [math.isfinite(loss) for loss in losses(result)] == [True, True, False, False, True, True]

    weights = overflowing.weights
    assert torch.equal(weights[2], weights[1])
    assert torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[4], weights[3])
    checkpoint = last_checkpoint(result.folder)
    assert checkpoint is not None
    assert torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"] == 65536.0 / 4
    assert result.row["status"] == "finished"


def test_a_run_that_overflows_to_its_end_is_measured_and_keeps_its_weights(
    data: PackedData, half_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    class Large(Callback):
        def begin(self, run: RunState) -> None:
            with torch.no_grad():
                run.model.model.blocks[0].attention.q_proj.weight.mul_(2.0**20)

    result = train(half_run(steps=6), data, tmp_path / "run", callbacks=(Large(),))
    assert result.row["status"] == "diverged"
    assert math.isnan(result.row["eval_loss"])
    assert result.head_entropy["entropy_nats"].isna().any()
    assert all(weight.isfinite().all() for weight in final_weights(result).values())


def test_a_stopped_run_goes_on_with_the_scale_it_had(
    data: PackedData, half_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = half_run(warmup_ratio=0)
    whole = train(run, data, tmp_path / "whole", callbacks=(Overflowing(1, 2, 4),))
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(Overflowing(1, 2, 4), StopAt(5)))
    checkpoint = last_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"] == 65536.0 / 4
    assert_same(whole, train(run, data, tmp_path / "stopped", callbacks=(Overflowing(1, 2, 4),)))
    last, resumed = (last_checkpoint(tmp_path / name) for name in ("whole", "stopped"))
    assert last is not None
    assert resumed is not None
    assert torch.load(last / "scaler.pt") == torch.load(resumed / "scaler.pt")


def test_other_precisions_are_left_as_they_are(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    result = train(tiny_run(precision="bf16"), data, tmp_path / "run")
    checkpoint = last_checkpoint(result.folder)
    assert checkpoint is not None
    assert not (checkpoint / "scaler.pt").exists()
