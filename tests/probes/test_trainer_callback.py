"""EntropyCallback in transformers' Trainer and in TRL's, against eager attention weights in float64."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.modeling_utils import AttentionInterface

import normfree
from normfree.errors import InputError

from . import small_models
from .training import arguments, assert_row, examples, losses_of, rows_of, train


def build(name, dropout=0.0, **overrides):
    """Without dropout of the embeddings, unless there is to be some."""
    if name == "gpt2":
        overrides["embd_pdrop"] = dropout
    return small_models.build(name, dropout, **overrides)


def attached():
    """Everything that a probe attaches itself to."""
    return (
        vars(AttentionInterface)["get_interface"],
        nn.functional.scaled_dot_product_attention,
        torch.softmax,
        len(torch_module._global_forward_hooks),
        len(torch_module._global_forward_pre_hooks),
    )


CASES: dict[str, Any] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "gradient_accumulation_steps": 2,
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_those_of_the_training_batches_and_training_is_the_same(tmp_path, case, name):
    before = attached()
    watched, recorded = train(build(name), tmp_path, [normfree.EntropyCallback(every=2)], **CASES[case])
    assert attached() == before
    rows = rows_of(watched)
    assert list(rows) == [2, 4]
    for step, row in rows.items():
        assert len(recorded.batches[step - 1]) == CASES[case].get("gradient_accumulation_steps", 1)
        assert_row(row, recorded.models[step - 1], recorded.batches[step - 1])

    alone, _ = train(build(name), tmp_path, **CASES[case])
    assert losses_of(watched) == losses_of(alone)
    for mine, other in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_dropout_draws_the_same_random_numbers(tmp_path, precision):
    runs = [
        train(build("gpt2", dropout=0.2), tmp_path, callbacks, **precision)[0]
        for callbacks in ([normfree.EntropyCallback(every=1)], [])
    ]
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert len(rows_of(runs[0])) == 4


def test_nothing_is_attached_between_probed_steps(tmp_path):
    class Watching(TrainerCallback):
        seen: tuple[tuple[int, bool], ...] = ()

        def on_substep_end(self, args, state, control, **_):
            self.seen = (*self.seen, (state.global_step + 1, attached() == before))

    before, watching = attached(), Watching()
    callback = normfree.EntropyCallback(every=3)
    train(build("gpt2"), tmp_path, [callback, watching], gradient_accumulation_steps=2)
    assert watching.seen == ((1, True), (2, True), (3, False), (4, True))
    assert repr(callback).startswith("EntropyCallback(every=3, step 3: mean ")
    assert len(callback.layers) == 2
    assert copy.deepcopy(callback).every == 3


def test_log_history_keeps_the_losses_it_would_have(tmp_path):
    """The entry of a probed step neither shortens the Trainer's averages nor takes the place of its own entry."""
    runs = [
        train(build("gpt2"), tmp_path, callbacks, logging_steps=3, max_steps=6)[0]
        for callbacks in ([normfree.EntropyCallback(every=2)], [])
    ]
    assert [losses_of(run) for run in runs[:1]] == [losses_of(run) for run in runs[1:]]
    steps = [(entry["step"], "loss" in entry) for entry in runs[0].state.log_history[:-1]]
    assert steps == [(2, False), (3, True), (4, False), (6, False), (6, True)]


def test_the_first_step_with_logging_first_step_and_layers_alone(tmp_path):
    callback = normfree.EntropyCallback(every=100, per_head=False)
    trainer, _ = train(build("gpt2"), tmp_path, [callback], logging_first_step=True, max_steps=2)
    rows = rows_of(trainer)
    assert list(rows) == [1]
    assert {"entropy/L0", "entropy/L1"} < rows[1].keys()
    assert not any("H" in name for name in rows[1])


def test_checkpoints_during_training_and_resume(tmp_path):
    def resume(callbacks):
        kwargs: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        trainer, _ = train(build("gpt2"), tmp_path, callbacks, **kwargs)
        again = type(trainer)(
            build("gpt2"), arguments(tmp_path, **kwargs), train_dataset=examples(), callbacks=callbacks
        )
        again.recorded = trainer.recorded
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return trainer, again

    whole, resumed = resume([normfree.EntropyCallback(every=2)])
    assert list(rows_of(whole)) == list(rows_of(resumed)) == [2, 4, 6]
    assert rows_of(whole) == rows_of(resumed)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in saved["log_history"] if "entropy/mean" in entry] == [2, 4]
    assert losses_of(resumed) == losses_of(resume([])[1])


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(1)
        return peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.0))

    watched, recorded = train(model(), tmp_path, [normfree.EntropyCallback(every=2)])
    for step, row in rows_of(watched).items():
        assert_row(row, recorded.models[step - 1].merge_and_unload(), recorded.batches[step - 1])
    assert losses_of(watched) == losses_of(train(model(), tmp_path)[0])


def test_a_compiled_model_runs_uncompiled_in_probed_steps(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, recorded = train(
            build("gpt2"),
            tmp_path,
            [normfree.EntropyCallback(every=2)],
            torch_compile=True,
            torch_compile_backend="eager",
            max_steps=3,
        )
    assert list(rows_of(trainer)) == [2]
    assert_row(rows_of(trainer)[2], recorded.models[1], recorded.batches[1])
    torch.compiler.reset()


def test_tensorboard_and_trackio_get_the_rows(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    trainer, _ = train(
        build("gpt2"),
        tmp_path,
        [normfree.EntropyCallback(every=2)],
        report_to=["tensorboard", "trackio"],
        project="normfree-test",
        run_name="watched",
    )
    rows = rows_of(trainer)
    events = tensorboard.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    kept = SQLiteStorage.get_logs("normfree-test", "watched")
    by_step = {each["train/global_step"]: each for each in kept if "train/entropy/mean" in each}
    assert list(by_step) == list(rows) == [2, 4]
    for name in rows[2]:
        scalars = events.Scalars(f"train/{name}")
        assert [each.step for each in scalars] == [2, 4]
        for each in scalars:
            assert math.isclose(each.value, rows[each.step][name], rel_tol=1e-6)
            assert by_step[each.step][f"train/{name}"] == pytest.approx(rows[each.step][name])


def word_tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def text(i, n):
    return " ".join(f"w{2 + (7 * i + 3 * j) % 48}" for j in range(n))


def recorded_batches(trainer):
    """Filled with the inputs of the trainer's losses while it trains."""
    batches, compute_loss = [], trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append({name: each.clone() for name, each in inputs.items() if isinstance(each, torch.Tensor)})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    return batches


def test_an_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    texts = [text(i, 6 + i % 5) for i in range(16)]

    def fine_tune(callbacks):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=True,
        )
        trainer = trl.SFTTrainer(
            build("llama"),
            args,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=word_tokenizer(),
            callbacks=callbacks,
        )
        batches = recorded_batches(trainer)
        trainer.train()
        return trainer, batches

    watched, batches = fine_tune([normfree.EntropyCallback(every=1)])
    assert list(rows_of(watched)) == [1, 2, 3, 4]
    assert_row(rows_of(watched)[1], build("llama"), batches[:2])
    assert losses_of(watched) == losses_of(fine_tune([])[0])
    # TRL averages its own metrics over the steps since its last log entry: they are in those entries, and there alone
    own = [entry for entry in watched.state.log_history if "mean_token_accuracy" in entry]
    assert [entry["step"] for entry in own] == [2, 4]
    assert not any("entropy/mean" in entry for entry in own)


def test_a_grpo_trainer_samples_within_its_steps(tmp_path):
    """What it generates, and its reference policy (the model without its adapter), are no training batches."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")

    def reinforce(callbacks):
        args = trl.GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            beta=0.1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
        )
        trainer = trl.GRPOTrainer(
            build("llama"),
            reward_funcs=lambda completions, **_: [float(len(set(each))) for each in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [text(i, 3 + i % 3) for i in range(8)]}),
            processing_class=word_tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["q_proj"]),
            callbacks=callbacks,
        )
        batches = recorded_batches(trainer)
        trainer.train()
        return trainer, batches

    watched, (batch, *_) = reinforce([normfree.EntropyCallback(every=1)])
    assert list(rows_of(watched)) == [1, 2]
    whole = {
        name: torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1)
        for name, part in (("input_ids", "ids"), ("attention_mask", "mask"))
    }
    assert_row(rows_of(watched)[1], build("llama"), [whole])
    assert losses_of(watched) == losses_of(reinforce([])[0])


@pytest.mark.parametrize(("on_alert", "steps"), [("warn", 4), ("stop", 1)])
def test_alerts_warn_and_stop(tmp_path, on_alert, steps):
    model = build("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
    callback = normfree.EntropyCallback(every=1, alert_overloaded=0.5, alert_collapsed=0.5, on_alert=on_alert)
    with pytest.warns(UserWarning, match=r"^step 1: 100.0 % of the attention heads are overloaded") as warned:
        trainer, _ = train(model, tmp_path, [callback], learning_rate=0.0)
    assert trainer.state.global_step == steps
    alerts = [str(each.message) for each in warned if "attention heads are" in str(each.message)]
    assert len(alerts) == 1  # as long as it lasts
    assert alerts[0].endswith("; the run stops") == (on_alert == "stop")


def test_collapsed_heads(tmp_path):
    model = build("gpt2", initializer_range=5.0)
    callback = normfree.EntropyCallback(every=1, alert_collapsed=0.2)
    with pytest.warns(UserWarning, match="collapsed: entropy below a quarter of the entropy of uniform attention"):
        trainer, _ = train(model, tmp_path, [callback], max_steps=1)
    assert rows_of(trainer)[1]["entropy/collapsed_share"] > 0.2


def test_non_finite_scores_are_counted_and_not_averaged_away(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[0] = math.nan  # the queries of head 0
    trainer, _ = train(model, tmp_path, [normfree.EntropyCallback(every=1)], max_steps=1)
    row = rows_of(trainer)[1]
    mask = trainer.recorded.batches[0][0]["attention_mask"]
    n_visible = int((torch.ones(12, 12).tril() * mask[:, None, :]).sum())
    assert row["entropy/nan_scores"] == n_visible
    assert row["entropy/inf_scores"] == 0
    assert math.isnan(row["entropy/L1H0"])
    assert math.isnan(row["entropy/L1"])
    assert math.isnan(row["entropy/mean"])
    assert row["entropy/L0"] > 0
    assert row["entropy/L1H1"] > 0


def test_what_cannot_be_read_is_named_once(tmp_path):
    class Odd(nn.Module):
        """Replaces the attention of a layer by one that is none."""

        def forward(self, hidden_states, **_):
            return hidden_states, None

    class OddAttention(Odd):
        pass

    model = build("gpt2")
    model.transformer.h[1].attn = OddAttention()
    with pytest.warns(UserWarning, match=r"not logged for transformer\.h\.1\.attn: ") as warned:
        trainer, _ = train(model, tmp_path, [normfree.EntropyCallback(every=1)])
    assert len([each for each in warned if "not logged" in str(each.message)]) == 1
    for row in rows_of(trainer).values():
        assert "entropy/L0H3" in row
        assert not any(name.startswith("entropy/L1") for name in row)
        assert row["entropy/mean"] == pytest.approx(row["entropy/L0"])


def test_a_model_without_attention_trains_with_one_warning(tmp_path):
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.warns(UserWarning, match="attention entropy cannot be logged: ") as warned:
        trainer, _ = train(MambaForCausalLM(config), tmp_path, [normfree.EntropyCallback(every=1)])
    assert trainer.state.global_step == 4
    assert rows_of(trainer) == {}
    assert len([each for each in warned if "cannot be logged" in str(each.message)]) == 1


def test_an_error_of_the_measurement_does_not_reach_the_training(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(normfree.EntropyProbe, "per_head", fail)
    with pytest.warns(UserWarning, match="attention entropy cannot be logged: RuntimeError: no memory left") as warned:
        trainer, _ = train(build("gpt2"), tmp_path, [normfree.EntropyCallback(every=1)])
    assert trainer.state.global_step == 4
    assert len(warned) == 1


def test_a_step_that_fails_leaves_nothing_behind_at_the_next_run(tmp_path):
    before = attached()
    callback = normfree.EntropyCallback(every=1)

    class Failing(TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            raise MemoryError

    with pytest.raises(MemoryError):
        train(build("gpt2"), tmp_path, [callback, Failing()], gradient_accumulation_steps=2)
    trainer, recorded = train(build("gpt2"), tmp_path, [callback])
    assert attached() == before
    assert_row(rows_of(trainer)[1], recorded.models[0], recorded.batches[0])


def test_the_model_has_no_hooks_of_its_own_in_a_probed_step(tmp_path):
    class Looking(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **_):
            kept = [each for module in model.modules() for each in _hooks(module)]
            assert kept == []
            model.save_pretrained(tmp_path / "saved")
            copy.deepcopy(model)

    train(build("gpt2"), tmp_path, [normfree.EntropyCallback(every=1), Looking()], gradient_accumulation_steps=2)


def _hooks(module):
    found = vars(module)
    return [*found["_forward_hooks"].values(), *found["_forward_pre_hooks"].values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is a number of optimizer steps"),
        ({"every": 1.5}, "every is a number of optimizer steps"),
        ({"alert_collapsed": 1.5}, "alert_collapsed is a share of the heads"),
        ({"alert_overloaded": -0.1}, "alert_overloaded is a share of the heads"),
        ({"on_alert": "halt"}, "unknown on_alert 'halt'"),
    ],
)
def test_arguments_that_are_not_allowed(arguments, message):
    with pytest.raises(InputError, match=message):
        normfree.EntropyCallback(**arguments)
    with pytest.raises(InputError, match=message):
        normfree.EntropyMonitor(build("gpt2"), **arguments)
