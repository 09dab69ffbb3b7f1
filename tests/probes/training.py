"""Tiny runs of transformers' Trainer, and what they should log: eager attention weights in float64 NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

ATOL = 2e-5


def examples(n=24, n_token=12, seed=0):
    """Sequences of ``n_token`` tokens, a third of them with padding at their end."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(1, 50, (n_token,), generator=generator)
        mask = torch.ones(n_token, dtype=torch.int64)
        if i % 3 == 1:
            mask[-4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


class Recorded:
    """What a run computes from: its weights before each step, and the batches of the step."""

    def __init__(self):
        self.models = []
        self.batches = []

    def callback(self):
        recorded = self

        class Snapshots(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **_):
                recorded.models.append(copy.deepcopy(model))
                recorded.batches.append([])

        return Snapshots()


class RecordingTrainer(Trainer):
    """Keeps the batches that it trains on, as the model gets them."""

    recorded: Recorded

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.recorded.batches[-1].append({name: each.clone() for name, each in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


def arguments(folder, **changed: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.05,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(given | changed))


def train(model, folder, callbacks=(), **changed: Any):
    """The trainer after its run, and what was recorded of it."""
    recorded = Recorded()
    trainer = RecordingTrainer(
        model,
        arguments(folder, **changed),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=1),
        callbacks=[recorded.callback(), *callbacks],
    )
    trainer.recorded = recorded
    trainer.train()
    return trainer, recorded


def rows_of(trainer) -> dict[int, dict[str, float]]:
    """The entries with entropies in the Trainer's log, by step."""
    rows = [entry for entry in trainer.state.log_history if "entropy/mean" in entry]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: {name: row[name] for name in row if name.startswith("entropy/")} for row in rows}


def losses_of(trainer) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def eager(model):
    twin = copy.deepcopy(model).double().eval()
    twin.set_attn_implementation("eager")
    return twin


def expected_row(model, batches) -> dict[str, float]:
    """From the attention weights of every layer, [batch, n_head, T, T], as the model returns them in eager mode."""
    entropy, bound, sink, rows = 0.0, 0.0, 0.0, 0
    for each in batches:
        inputs = {name: each[name] for name in ("input_ids", "attention_mask") if name in each}
        with torch.no_grad():
            attentions = eager(model)(**inputs, output_attentions=True).attentions
        p = np.stack([weights.numpy() for weights in attentions])
        mask = each.get("attention_mask", torch.ones_like(each["input_ids"])).numpy().astype(bool)
        counted = mask[None, :, None, :]
        visible = (np.tril(np.ones(p.shape[-2:])) * mask[:, None, :]).sum(-1)
        entropy += (-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1) * counted).sum((1, 3))
        bound += np.where(mask, np.log(np.maximum(visible, 1)), 0.0).sum()
        sink += (p[..., 0] * counted).sum((1, 3))
        rows += mask.sum()
    heads, normalized = np.asarray(entropy / rows), np.asarray(entropy / bound)
    expected: dict[str, Any] = {
        "entropy/mean": heads.mean(),
        "entropy/overloaded_share": (normalized >= 0.75).mean(),
        "entropy/collapsed_share": (normalized < 0.25).mean(),
        "entropy/sink_share": np.mean(sink / rows),
        "entropy/nan_scores": 0,
        "entropy/inf_scores": 0,
    }
    for layer, of_layer in enumerate(heads):
        expected[f"entropy/L{layer}"] = of_layer.mean()
        expected |= {f"entropy/L{layer}H{head}": value for head, value in enumerate(of_layer)}
    return expected


def assert_row(row, model, batches):
    expected = expected_row(model, batches)
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(row[name] - value) < ATOL, (name, row[name], value)
