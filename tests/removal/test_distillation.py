"""A removal that learns from the original: what it minimizes, written out, and that a stop changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from normfree import from_hf
from normfree.data import PackedData, prepare_data
from normfree.errors import InputError
from normfree.removal import finetuning, remove
from normfree.removal.finetuning import remove_by_finetuning
from normfree.removal.layout import REMOVAL_FILE
from normfree.removal.midway import Midway
from normfree.removal.schedule import RemovalSchedule, automatic_schedule, load_schedule
from normfree.training import RunConfig, load_result
from normfree.training.lora import LoraOptions
from tests.stop_at import StopAt

from ..training.objectives.test_entropy_regularization import metric
from ..training.test_telemetry import BatchLog
from .models import STOCK
from .small_removals import STEPS, corpus, run_from, weights

__all__ = ["corpus"]
Command = Callable[..., tuple[int, str, str]]
WEIGHT, STD_WEIGHT, RATE = 0.7, 0.25, 1e-3


def saved(name: str, folder: Path) -> Path:
    """A stock model without dropout, so that student and teacher begin as one."""
    torch.manual_seed(0)
    small = STOCK[name]()
    small.resize_token_embeddings(270)
    for option in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if hasattr(small.config, option):
            setattr(small.config, option, 0.0)
    small.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(STOCK))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("gpt2", tmp_path_factory.mktemp("gpt2"))


def schedule_of(weight: float, steps: int = STEPS) -> RemovalSchedule:
    changes = {"distillation_weight": weight, "std_loss_weight": STD_WEIGHT}
    return automatic_schedule(3, steps).model_copy(update=changes)


def prepared(model: Path, corpus: Path, tmp_path: Path, **recipe: Any) -> tuple[RunConfig, PackedData, Any]:
    run = run_from(str(model), corpus, **recipe)
    return run, prepare_data(run.data, tmp_path / "cache"), from_hf(AutoModelForCausalLM.from_pretrained(model)).config


def in_a_loop(
    model: Path, batches: list[torch.Tensor], schedule: RemovalSchedule
) -> tuple[Any, dict[str, list[float]]]:
    """The removal without Normfree's loop, objectives and losses; the teacher is the stock model."""
    teacher = AutoModelForCausalLM.from_pretrained(model).eval()
    midway = Midway(from_hf(AutoModelForCausalLM.from_pretrained(model)), schedule)
    student = midway.model
    removals = schedule.removals(student.config)
    decayed = [p for p in student.parameters() if p.dim() == 2]
    others = [p for p in student.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    seen: dict[str, list[float]] = {"train_loss": [], "cross_entropy_nats": [], "distillation_kl_nats": []}
    final: list[torch.Tensor] = []
    student.model.blocks[-1].register_forward_hook(lambda _, inputs, output: final.append(output))
    for step, batch in enumerate(batches):
        for removal in removals:
            if removal.step == step:
                midway.apply(removal)
        midway.begin_step(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0 if step == 0 else (len(batches) - step) / (len(batches) - 1))
        logits = student.train()(batch).logits
        with torch.no_grad():
            taught = teacher(batch).logits
        cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        log_p, log_q = (each[:, :-1].double().log_softmax(-1) for each in (taught, logits))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        x = final.pop()
        if student.config.norm_is_centered and "Llama" not in type(teacher).__name__:
            x = x - x.mean(-1, keepdim=True)
        std = (x.square().mean(-1) + student.model.final_norm.eps).sqrt()
        share = midway.tokens.share(std[..., None])
        ordinary = torch.ones_like(std, dtype=torch.bool) if share is None else share[..., 0] == 0
        mismatch = (std - std.detach()[ordinary].mean()).square().mean()
        loss = (1 - WEIGHT) * cross_entropy + WEIGHT * kl + STD_WEIGHT * mismatch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        for name, value in zip(seen, (loss, cross_entropy, kl), strict=True):
            seen[name].append(value.item())
    return student, seen


def test_it_minimizes_the_mixture_while_the_norms_go(model: Path, corpus: Path, tmp_path: Path) -> None:
    run, data, config = prepared(model, corpus, tmp_path, learning_rate=RATE, warmup_steps=1)
    schedule, batches = schedule_of(WEIGHT), BatchLog()
    result = remove_by_finetuning(run, data, tmp_path / "run", schedule, config, callbacks=(batches,))
    student, expected = in_a_loop(model, batches.batches, schedule)
    for name, values in expected.items():
        np.testing.assert_allclose(metric(result, name), values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert metric(result, "distillation_kl_nats")[0] == pytest.approx(0, abs=1e-6), "the original itself"
    assert metric(result, "distillation_kl_nats")[-1] > 1e-4
    trained = weights(tmp_path / "run")
    for name, tensor in student.named_parameters():
        torch.testing.assert_close(trained[name], tensor.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_a_stopped_one_resumes_to_the_same_weights(model: Path, corpus: Path, tmp_path: Path) -> None:
    run, data, config = prepared(model, corpus, tmp_path)
    schedule = schedule_of(1.0)
    whole = remove_by_finetuning(run, data, tmp_path / "whole", schedule, config)
    for step in (2, 9):
        with pytest.raises(KeyboardInterrupt):
            remove_by_finetuning(run, data, tmp_path / "parts", schedule, config, callbacks=(StopAt(step),))
    parts = remove_by_finetuning(run, data, tmp_path / "parts", schedule, config)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    for name in ("train_loss", "cross_entropy_nats", "distillation_kl_nats"):
        assert metric(parts, name) == metric(whole, name)


def test_divergence_is_watched_in_cross_entropy(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss that is minimized begins at zero; what the watch reports is the loss of the text."""
    run, data, config = prepared(gpt2, corpus, tmp_path, steps=40)
    schedule = schedule_of(1.0, 40).model_copy(update={"std_loss_weight": 0.0})
    minimized: list[float] = []
    back = finetuning._go_back

    def go_back(folder: Path, wanted: int, latest: int) -> int:
        metrics = pd.read_parquet(folder / "metrics.parquet")
        minimized.extend(metrics.loc[metrics["name"] == "train_loss", "value"])
        finetuning.MAX_JUMP = 100.0
        return back(folder, wanted, latest)

    monkeypatch.setattr(finetuning, "_go_back", go_back)
    monkeypatch.setattr(finetuning, "MAX_JUMP", -1.0)
    remove_by_finetuning(run, data, tmp_path / "run", schedule, config)
    (stretch,) = json.loads((tmp_path / "run" / REMOVAL_FILE).read_text())["stretches"]
    reported = float(stretch["jump"].split("a loss of ")[1].split(" nats")[0])
    assert reported > 1.0
    assert max(minimized) < 0.1


def test_the_export_the_schedule_file_and_low_rank_changes(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    """Adapters change the student alone."""
    pytest.importorskip("peft")
    run, data, _ = prepared(gpt2, corpus, tmp_path)
    run = run.model_copy(update={"lora": LoraOptions(rank=2)})
    result = remove(run, data, tmp_path / "out", schedule_of(1.0), vanilla=False)
    assert load_schedule(str(tmp_path / "out" / "schedule.yaml")) == schedule_of(1.0)
    assert AutoModelForCausalLM.from_pretrained(result.norm_free).config.norm == "none"
    kl = metric(load_result(tmp_path / "out" / "removal"), "distillation_kl_nats")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-5
    with pytest.raises(InputError, match="holds a removal by another schedule"):
        remove(run, data, tmp_path / "out", schedule_of(0.5), vanilla=False)


def test_a_share_of_more_than_all_is_refused(normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text("stages: []\ndistillation_weight: 1.5\n")
    out = ("--corpus", f"directory:{corpus}", "--out", "out", "--schedule", "schedule.yaml")
    code, _, err = normfree("remove-norm", gpt2, *out)
    assert (code, err.count("\n")) == (2, 1), err
    assert "distillation_weight: Input should be less than or equal to 1" in err
    assert not (tmp_path / "out").exists()
