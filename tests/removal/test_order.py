"""The order of removals by measurement, and that it is measured once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from normfree import from_hf
from normfree.data import PackedData, prepare_data
from normfree.errors import InputError
from normfree.removal import finetuning, remove
from normfree.removal.midway import Midway
from normfree.removal.order import norm_costs
from normfree.removal.schedule import RemovalSchedule, load_schedule, pretrained_schedule
from normfree.training import Callback, RunState
from normfree.training.evaluation import sequence_losses

from .models import STOCK, scheduled
from .small_removals import STEPS, corpus, run_from

__all__ = ["corpus"]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its middle feed-forward norm is the costly one: stds before it differ by far, and what reads it matters most."""
    torch.manual_seed(0)
    model = STOCK["llama"]()
    model.resize_token_embeddings(270)
    with torch.no_grad():
        model.model.embed_tokens.weight *= torch.logspace(-1, 1, 270)[:, None]
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight *= 0.01
        model.model.layers[1].mlp.down_proj.weight *= 3e3
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    return prepare_data(run_from(str(llama), corpus).data, tmp_path_factory.mktemp("cache"))


def test_each_cost_is_that_of_one_constant_alone(llama: Path, corpus: Path, data: PackedData) -> None:
    """Against transformers' model, one of whose norms is replaced by a function that divides by a constant."""
    schedule = scheduled(special_tokens="measured", std_statistic="median", special_factor=3.0, stages=measured(9))
    n = min(len(data.train), 2048 // 24)
    rows = [data.train[int(each)]["input_ids"] for each in np.linspace(0, len(data.train) - 1, n)]
    ids = torch.stack(rows)
    midway = Midway(from_hf(AutoModelForCausalLM.from_pretrained(llama)).train(), schedule)
    midway.model(ids)  # sets the running stds
    before = {name: buffer.clone() for name, buffer in midway.model.named_buffers()}
    costs = norm_costs(midway, schedule.removals(midway.model.config), data.train, "fp32")
    assert midway.model.training
    assert not midway.gone
    assert not any(any(norm.is_constant) for _, norm in midway.norms())
    for name, buffer in midway.model.named_buffers():
        assert torch.equal(buffer.nan_to_num(), before[name].nan_to_num()), name
    assert list(costs["loss_increase"]) == sorted(costs["loss_increase"], reverse=True)
    assert (costs["part"].iloc[0], costs["layer"].iloc[0]) == ("ffn", 1) or costs["part"].iloc[0] == "final"

    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        base = sequence_losses(model(ids).logits, ids).double().mean().item()
        for layer in range(3):
            norm = model.model.layers[layer].post_attention_layernorm

            def constant(x: torch.Tensor, norm: Any = norm) -> torch.Tensor:
                s = np.sqrt((x.double().numpy() ** 2).mean(-1) + norm.variance_epsilon)
                is_massive = s > 3 * np.median(s, axis=1, keepdims=True)
                special = s[is_massive].mean() if is_massive.any() else 1.0
                divisor = np.where(is_massive, special, np.median(s[~is_massive]))
                return x / torch.from_numpy(divisor)[..., None].float() * norm.weight

            kept, norm.forward = norm.forward, constant
            increase = sequence_losses(model(ids).logits, ids).double().mean().item() - base
            norm.forward = kept
            (found,) = costs[(costs["part"] == "ffn") & (costs["layer"] == layer)]["loss_increase"]
            assert found == pytest.approx(increase, abs=2e-5), layer


def measured(after: float) -> list[dict[str, object]]:
    parts = ("ffn", "attention_qk", "attention_v", "final", "massive_tokens")
    return [{"part": part, "after": 1 if part == "ffn" else after, "gap": 0} for part in parts]


def test_an_order_is_measured_once_and_kept(
    llama: Path, corpus: Path, data: PackedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(llama), corpus)
    given = pretrained_schedule(3, STEPS)
    config = from_hf(AutoModelForCausalLM.from_pretrained(llama)).config
    steps = [each.step for each in given.removals(config)]
    remove(run, data, tmp_path / "a", given, vanilla=False)
    assert load_schedule(str(tmp_path / "a" / "schedule.yaml")) == given
    costs = pd.read_csv(tmp_path / "a" / "removal" / "norm-costs.csv")
    removals = json.loads((tmp_path / "a" / "removal" / "removal.json").read_text())["removals"]
    assert [each["step"] for each in removals] == steps
    layers = [None if pd.isna(layer) else int(layer) for layer in costs["layer"]]
    expected = [*zip(costs["part"], layers, strict=True), ("massive_tokens", None)]
    assert [(each["part"], each["layer"]) for each in removals] == expected

    class Stop(Callback):
        """Interrupts the run after the order was measured, before its next checkpoint, once."""

        left = 1

        def end_step(self, run: RunState) -> None:
            if run.step == steps[0] + 1 and self.left:
                self.left = 0
                raise KeyboardInterrupt

    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        remove(run, data, tmp_path / "b", given, vanilla=False, callbacks=lambda *_: (stop,))
    kept = (tmp_path / "b" / "removal" / "norm-costs.csv").read_text()
    assert kept == (tmp_path / "a" / "removal" / "norm-costs.csv").read_text()

    def never(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(finetuning, "norm_costs", never)
    remove(run, data, tmp_path / "b", given, vanilla=False)
    one, other = (load_file(tmp_path / each / "norm-free" / "model.safetensors") for each in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed: RemovalSchedule = given.model_copy(update={"ramp_steps": 2})
    with pytest.raises(InputError, match="holds a removal by another schedule"):
        remove(run, data, tmp_path / "b", changed, vanilla=False)


def test_a_resumed_removal_needs_its_order(llama: Path, corpus: Path, data: PackedData, tmp_path: Path) -> None:
    run = run_from(str(llama), corpus, save_steps=2)
    remove(run, data, tmp_path, pretrained_schedule(3, STEPS), vanilla=False)
    folder = tmp_path / "removal"
    for name in ("norm-costs.csv", "results.csv"):
        (folder / name).unlink()
    last = max(folder.glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]))
    shutil.rmtree(last)
    with pytest.raises(InputError, match=r"norm-costs\.csv is missing"):
        remove(run, data, tmp_path, pretrained_schedule(3, STEPS), vanilla=False)


def test_the_command_takes_an_order(normfree: Command, llama: Path, corpus: Path, tmp_path: Path) -> None:
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270", "--steps", "16"]
    size += ["--set", "data.sequence_length=24", "--set", "data.eval_tokens=480"]
    size += ["--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4"]
    size += ["--set", "recipe.precision=fp32", "--no-vanilla"]
    code, _, err = normfree("remove-norm", llama, *size, "--order", "cheapest", "--out", "no")
    assert code == 2
    assert "--order" in err
    assert not (tmp_path / "no").exists()
    for order in ("auto", "published"):
        code, _, err = normfree("remove-norm", llama, *size, "--order", order, "--out", order)
        assert code == 0, err
        assert (tmp_path / order / "removal" / "norm-costs.csv").exists() == (order == "auto")
    parts = [stage.part for stage in load_schedule(str(tmp_path / "published" / "schedule.yaml")).stages]
    assert parts == ["ffn", "attention_qk", "attention_v", "final", "massive_tokens"]
