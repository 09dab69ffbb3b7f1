"""EntropyMonitor in plain loops and Lightning's twin of EntropyCallback, against eager attention weights in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.modules import module as torch_module

import normfree
from normfree.errors import InputError

from .small_models import build
from .training import assert_row, examples, expected_row


def batches(n=6, size=4):
    rows = examples(n * size)
    return [
        {name: torch.stack([each[name] for each in rows[i : i + size]]) for name in rows[0]}
        for i in range(0, n * size, size)
    ]


def loop(model, monitor=None):
    """Six steps of two micro-batches; the losses, the rows by step, and the model before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, rows, models = [], {}, []
    for step, batch in enumerate(batches()):
        models.append(copy.deepcopy(model))
        halves = [{name: each[i : i + 2] for name, each in batch.items()} for i in (0, 2)]
        with monitor.step(step) if monitor else _nothing() as row:
            for half in halves:
                loss = model(**half).loss
                loss.backward()
                losses.append(loss.item())
        assert row is not None
        optimizer.step()
        optimizer.zero_grad()
        if row:
            rows[step] = row
    return losses, rows, models


class _nothing:  # noqa: N801
    def __enter__(self):
        return {}

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_rows_of_a_plain_loop(name):
    with normfree.EntropyMonitor(build(name), every=2) as monitor:
        losses, rows, models = loop(monitor._model, monitor)
        assert list(rows) == [0, 2, 4]
        assert len(monitor.layers) == 2
        assert repr(monitor).startswith(f"EntropyMonitor({type(models[0]).__name__}, every=2, step 4: mean ")
    for step, row in rows.items():
        assert_row(row, models[step], [batches()[step]])
    assert losses == loop(build(name))[0]
    assert repr(monitor).startswith("EntropyMonitor(closed, ")
    with pytest.raises(InputError, match="this EntropyMonitor is closed"), monitor.step(6):
        pass


def test_the_row_is_empty_inside_and_in_steps_that_are_not_probed():
    model = build("llama")
    monitor = normfree.EntropyMonitor(model, every=3)
    assert repr(monitor) == "EntropyMonitor(LlamaForCausalLM, every=3, no step probed yet)"
    for step in range(4):
        with monitor.step(step) as row:
            assert row == {}
            model(**batches()[0])
        assert bool(row) == (step in (0, 3))


def test_evaluation_and_generation_inside_of_a_step_do_not_count():
    model, (batch, other, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with monitor.step(0) as row:
        with torch.no_grad():
            model(**other)
            model.generate(other["input_ids"][:1], max_new_tokens=3, do_sample=False)
        model(**batch).loss.backward()
        with torch.inference_mode():
            model.model(input_ids=other["input_ids"])
    assert_row(row, model, [batch])


def test_a_step_without_gradients_at_all_counts_everything():
    model, (batch, other, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with torch.no_grad(), monitor.step(0) as row:
        model(**batch)
        model(**other)
    assert_row(row, model, [batch, other])


def test_the_decoder_alone_may_be_called():
    """As losses do that never build all logits."""
    model, (batch, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with monitor.step(0) as row:
        model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert_row(row, model, [batch])


def test_an_exception_leaves_the_step_and_the_monitor_goes_on():
    before = len(torch_module._global_forward_hooks)
    model, (batch, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with pytest.raises(IndexError), monitor.step(0) as row:
        model(input_ids=torch.full((1, 4), 10_000))
    assert row == {}
    assert len(torch_module._global_forward_hooks) == before
    with monitor.step(0) as row:
        model(**batch)
    assert_row(row, model, [batch])


def test_a_forward_pass_that_fails_without_gradients_does_not_end_the_measurement():
    model, (batch, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with monitor.step(0) as row:
        with torch.no_grad(), pytest.raises(IndexError):
            model(input_ids=torch.full((1, 4), 10_000))
        model(**batch)
    assert_row(row, model, [batch])


def test_steps_inside_of_steps_are_refused():
    model, (batch, *_) = build("llama"), batches()
    monitor = normfree.EntropyMonitor(model)
    with monitor.step(0) as row:
        with pytest.raises(InputError, match="already inside of a step"), monitor.step(100):
            pass
        model(**batch)
    assert_row(row, model, [batch])


def test_a_step_that_computes_nothing_is_warned_of():
    monitor = normfree.EntropyMonitor(build("llama"))
    with pytest.warns(UserWarning, match="attention entropy cannot be logged: "), monitor.step(0) as row:
        pass
    assert row == {}


def test_an_alert_that_stops():
    model, (batch, *_) = build("llama", initializer_range=1e-3), batches()
    monitor = normfree.EntropyMonitor(model, every=1, alert_overloaded=0.5, on_alert="stop")
    assert not monitor.should_stop
    with pytest.warns(UserWarning, match=r"overloaded.*; the run stops$"), monitor.step(0):
        model(**batch)
    assert monitor.should_stop


def test_divided_heads_are_refused():
    model, (batch, *_) = build("llama"), batches()
    model._tp_size = 2
    monitor = normfree.EntropyMonitor(model)
    with pytest.warns(UserWarning, match="tensor parallelism divides its heads"), monitor.step(0) as row:
        model(**batch)
    assert row == {}


def test_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build("llama")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor = normfree.EntropyMonitor(prepared, every=1)
    with monitor.step(0) as row:
        for batch in batches()[:2]:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                before = copy.deepcopy(model)
                optimizer.step()
                optimizer.zero_grad()
    assert_row(row, before, batches()[:2])


def lightning_fit(folder, callbacks, initializer_range=0.3, **trainer):
    lightning: Any = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.model = build("llama", initializer_range=initializer_range)
            self.losses, self.seen, self.models = [], [], []

        def training_step(self, batch, batch_idx):
            self.models.append(copy.deepcopy(self.model))
            self.seen.append(batch)
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            self.model(**batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": CSVLogger(folder),
        "callbacks": callbacks,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    fitted = lightning.Trainer(**(given | trainer))
    fitted.fit(module, loader, torch.utils.data.DataLoader(examples(4, seed=1), batch_size=4))
    return fitted, module


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning(tmp_path, accumulated):
    pytest.importorskip("lightning")
    import pandas as pd

    from normfree.probes.lightning import EntropyCallback

    callback = EntropyCallback(every=3 // accumulated)
    trainer, module = lightning_fit(
        tmp_path,
        [callback],
        accumulate_grad_batches=accumulated,
        val_check_interval=1,
        num_sanity_val_steps=1,
        log_every_n_steps=3,  # also at probed steps
    )
    trainer.logger.save()
    logged = pd.read_csv(f"{trainer.logger.log_dir}/metrics.csv").set_index("step").filter(like="entropy/")
    steps = [2, 5] if accumulated == 1 else [0, 1, 2]  # Lightning counts logged steps from 0
    assert list(logged.dropna().index) == steps
    for step, (_, row) in zip(steps, logged.dropna().iterrows(), strict=True):
        of_step = slice(step * accumulated, (step + 1) * accumulated)
        assert_row(dict(row), module.models[of_step][0], module.seen[of_step])
    assert {name for name in trainer.callback_metrics if name.startswith("entropy/")} == set(logged.columns)
    _, alone = lightning_fit(tmp_path, [], accumulate_grad_batches=accumulated)
    assert module.losses == alone.losses


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning_stops(tmp_path):
    pytest.importorskip("lightning")
    from normfree.probes.lightning import EntropyCallback

    callback = EntropyCallback(every=2, alert_overloaded=0.5, on_alert="stop")
    with pytest.warns(UserWarning, match=r"^step 2: .* overloaded.*; the run stops$"):
        trainer, _ = lightning_fit(tmp_path, [callback], initializer_range=1e-3)
    assert trainer.global_step == 2


def test_layers_that_differ_in_heads():
    """As the two towers of a vision language model do: the second probed step reads them one by one."""

    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = build("llama"), build("gpt2", num_attention_heads=2, embd_pdrop=0.0)

        def forward(self, **batch):
            return self.first(**batch).loss + self.second(**batch).loss

    model, (batch, *_) = Towers(), batches()
    monitor = normfree.EntropyMonitor(model, every=1)
    with pytest.warns(UserWarning, match="from the next probed step on, layer by layer"), monitor.step(0) as row:
        model(**batch).backward()
    assert row == {}
    with monitor.step(1) as row:
        model(**batch).backward()
    assert monitor.layers == (
        "first.model.layers.0.self_attn",
        "first.model.layers.1.self_attn",
        "second.transformer.h.0.attn",
        "second.transformer.h.1.attn",
    )
    expected = [expected_row(model.first, [batch]), expected_row(model.second, [batch])]
    for layer in range(4):
        tower, of_tower = expected[layer // 2], layer % 2
        assert row[f"entropy/L{layer}"] == pytest.approx(tower[f"entropy/L{of_tower}"], abs=2e-5)
        assert row[f"entropy/L{layer}H1"] == pytest.approx(tower[f"entropy/L{of_tower}H1"], abs=2e-5)
    assert "entropy/L1H3" in row
    assert "entropy/L2H2" not in row
    weights = [8 / 12, 4 / 12]
    for name in ("entropy/mean", "entropy/overloaded_share", "entropy/collapsed_share", "entropy/sink_share"):
        mean = sum(weight * tower[name] for weight, tower in zip(weights, expected, strict=True))
        assert row[name] == pytest.approx(mean, abs=2e-5)


def test_tensor_parallel_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model, (batch, *_) = build("llama"), batches()
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        head = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        monitor = normfree.EntropyMonitor(model)
        with monitor.step(0) as row:
            model(**batch)
        assert row
        model.lm_head.weight = head
        with pytest.warns(UserWarning, match="tensor parallelism divides its heads"), monitor.step(100) as row:
            pass
        assert row == {}
    finally:
        torch.distributed.destroy_process_group()
