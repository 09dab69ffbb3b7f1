import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax
from transformers import AutoTokenizer, set_seed

from normfree import NormfreeForCausalLM
from normfree.data import PackedData
from normfree.errors import InputError
from normfree.training import Callback, RunConfig, RunResult, RunState, load_pretrained, load_result, train
from normfree.training.evaluation import evaluation_losses, perplexity, sequence_losses
from normfree.training.records import LAYERS_FILE, METRICS_FILE
from normfree.training.run_folder import last_checkpoint

from .test_telemetry import BatchLog


class StopAt(Callback):
    """Raises in the middle of a run, as a kill would end it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def begin_step(self, run: RunState) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


def losses(result: RunResult) -> list[float]:
    metrics = pd.read_parquet(result.folder / METRICS_FILE)
    return metrics[metrics["name"] == "train_loss"]["value"].tolist()


def final_weights(result: RunResult) -> dict[str, torch.Tensor]:
    checkpoint = last_checkpoint(result.folder)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def measured(result: RunResult) -> dict[str, pd.DataFrame]:
    """Everything a run recorded that has to repeat, so without the clock's readings."""
    metrics = pd.read_parquet(result.folder / METRICS_FILE).drop(columns="wall_seconds")
    return {
        "metrics": metrics[metrics["name"] != "tokens_per_second"].reset_index(drop=True),
        "layers": pd.read_parquet(result.folder / LAYERS_FILE),
        "losses": result.sequence_losses,
        "entropy": result.head_entropy,
    }


def assert_same(first: RunResult, second: RunResult) -> None:
    for name, table in measured(first).items():
        pd.testing.assert_frame_equal(table, measured(second)[name], check_exact=True)
    ours, theirs = final_weights(first), final_weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def half_cosine(step: int) -> float:
    """From 1 at step 2 to 0.2 at step 12."""
    return 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({"warmup_ratio": 0.25}, lambda step: (8 - step) / 6),
        (
            {
                "warmup_steps": 2,
                "learning_rate_decay": "cosine",
                "final_learning_rate_ratio": 0.2,
                "decay_steps": 12,
            },
            half_cosine,
        ),
    ],
    ids=["linear to the end", "a cosine that is longer than the budget"],
)
def test_training_is_adamw_with_warmup_and_decay_on_the_same_batches(
    options: dict[str, Any],
    decay: Callable[[int], float],
    data: PackedData,
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    """An independent loop, written out from the recipe, gives the same losses."""
    run, batches = tiny_run(steps=8, learning_rate=0.01, **options), BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))

    set_seed(run.seed)
    config = run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id)
    model = NormfreeForCausalLM(config)
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2]
    plain = [p for n, p in model.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    expected = []
    for step, batch in enumerate(batches.batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step / 2 if step < 2 else decay(step))
        logits = model(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    np.testing.assert_allclose(losses(result), expected, rtol=2e-5)
    assert expected[-1] < expected[0]


def test_the_same_seed_gives_the_same_run_bit_for_bit(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = tiny_run(model={"embedding_dropout": 0.1})
    first, second = train(run, data, tmp_path / "first"), train(run, data, tmp_path / "second")
    assert_same(first, second)
    other = train(tiny_run(seed=1, model={"embedding_dropout": 0.1}), data, tmp_path / "other")
    assert losses(other) != losses(first)


def test_all_configurations_see_the_same_batches(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    seen = []
    for place, options in enumerate(
        [
            {"norm": "layernorm", "activation": "gelu"},
            {"norm": "none", "activation": "relu"},
            {"norm": "rmsnorm", "activation": "learnable_leaky_relu", "embedding_dropout": 0.1},
        ]
    ):
        batches = BatchLog()
        train(tiny_run(model=options), data, tmp_path / str(place), callbacks=(batches,))
        seen.append(torch.stack(batches.batches))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("stop", [4, 5])
def test_a_stopped_run_ends_like_one_never_stopped(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path, stop: int
) -> None:
    run = tiny_run(model={"embedding_dropout": 0.1}, telemetry_steps=1)
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(StopAt(stop),))
    checkpoint = last_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert_same(whole, train(run, data, tmp_path / "stopped"))


def test_half_a_checkpoint_is_passed_over(data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = tiny_run()
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(StopAt(5),))
    half = tmp_path / "stopped" / "checkpoint-5"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert_same(whole, train(run, data, tmp_path / "stopped"))


def test_accumulated_micro_batches_are_one_batch(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    at_once = train(tiny_run(batch_size=8, micro_batch_size=8), data, tmp_path / "at-once")
    in_parts = train(tiny_run(batch_size=8, micro_batch_size=2), data, tmp_path / "in-parts")
    np.testing.assert_allclose(losses(at_once), losses(in_parts), rtol=1e-5)
    np.testing.assert_allclose(at_once.row["eval_loss"], in_parts.row["eval_loss"], rtol=1e-5)


def test_gradient_checkpointing_changes_no_loss(
    plain_run: RunResult, data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    checkpointed = train(tiny_run(gradient_checkpointing=True), data, tmp_path / "checkpointed")
    np.testing.assert_allclose(losses(plain_run), losses(checkpointed), rtol=1e-6)
    for name in ("layers", "entropy"):
        assert len(measured(plain_run)[name]) == len(measured(checkpointed)[name])


def test_eager_attention_changes_neither_the_losses_nor_the_telemetry(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    seen: list[str] = []

    class SeeImplementation(Callback):
        def begin(self, run: RunState) -> None:
            seen.append(run.model.config._attn_implementation)

    see = (SeeImplementation(),)
    sdpa = train(tiny_run(), data, tmp_path / "sdpa", callbacks=see)
    eager = train(tiny_run(attn_implementation="eager"), data, tmp_path / "eager", callbacks=see)
    assert seen == ["sdpa", "eager"]
    np.testing.assert_allclose(losses(sdpa), losses(eager), rtol=1e-5)
    layers = measured(sdpa)["layers"], measured(eager)["layers"]
    np.testing.assert_allclose(layers[0]["value"], layers[1]["value"], rtol=1e-3, atol=1e-5)


def test_compiled_training_gives_the_same_losses_and_telemetry(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """In one layer: a second one is another half a minute of a C++ compiler."""
    plain, compiled = (
        train(tiny_run(model={"n_layer": 1}, steps=3, torch_compile=is_compiled), data, tmp_path / str(is_compiled))
        for is_compiled in (False, True)
    )
    np.testing.assert_allclose(losses(plain), losses(compiled), rtol=1e-5)
    layers = measured(plain)["layers"], measured(compiled)["layers"]
    np.testing.assert_allclose(layers[0]["value"], layers[1]["value"], rtol=1e-3, atol=1e-5)
    assert last_checkpoint(compiled.folder) is not None
    assert set(final_weights(plain)) == set(final_weights(compiled))


def test_a_finished_run_is_not_trained_again(
    plain_run: RunResult, data: PackedData, tiny_run: Callable[..., RunConfig]
) -> None:
    again = train(tiny_run(), data, plain_run.folder, callbacks=(StopAt(0),))
    assert again.row == plain_run.row


def test_a_run_that_diverges_goes_on_and_keeps_its_last_good_checkpoint(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    class Poison(Callback):
        def end_step(self, run: RunState) -> None:
            if run.step == 4:
                with torch.no_grad():
                    run.model.model.blocks[0].ffn.up_proj.weight[0, 0] = math.nan

    result = train(tiny_run(telemetry_steps=1), data, tmp_path / "run", callbacks=(Poison(),))
    assert result.row["status"] == "diverged"
    assert math.isnan(result.row["eval_loss"])
    assert math.isnan(result.row["eval_ppl"])
    assert losses(result)[:4] == [loss for loss in losses(result) if math.isfinite(loss)]
    assert len(losses(result)) == 6
    checkpoint = last_checkpoint(result.folder)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert all(weight.isfinite().all() for weight in final_weights(result).values())
    nan = (
        pd.read_parquet(result.folder / LAYERS_FILE)
        .query("name == 'residual_nan_count'")
        .pivot(index="step", columns="layer", values="value")
    )
    assert list(nan.loc[3]) == [0, 0]
    assert (nan.loc[4] > 0).all()


def test_sequence_losses_are_the_mean_next_token_cross_entropy() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 5, 7)) * 10, generator.integers(0, 7, (3, 5))
    log_p = log_softmax(logits, axis=-1)
    expected = [-np.mean([log_p[b, t, labels[b, t + 1]] for t in range(4)]) for b in range(3)]
    ours = sequence_losses(torch.tensor(logits, dtype=torch.float32), torch.tensor(labels))
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)


def test_the_result_row_is_measured_on_all_evaluation_sequences(plain_run: RunResult, data: PackedData) -> None:
    result = plain_run
    model = NormfreeForCausalLM.from_pretrained(last_checkpoint(result.folder))
    tokens = torch.stack([data.eval[index]["input_ids"] for index in range(len(data.eval))])
    with torch.no_grad():
        log_p = model(tokens).logits.double().log_softmax(-1)
    expected = -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(dim=1)
    np.testing.assert_allclose(result.sequence_losses["loss_nats"], expected, atol=1e-5)
    assert result.row["eval_loss"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.row["eval_ppl"] == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert result.row["eval_sequences"] == len(data.eval) == 32
    assert result.row["tokens"] == 6 * 4 * 16
    assert load_result(result.folder).row == result.row


def test_weights_on_disk_are_safetensors_only(plain_run: RunResult) -> None:
    checkpoint = last_checkpoint(plain_run.folder)
    assert checkpoint is not None
    assert (checkpoint / "model.safetensors").exists()
    assert not list(checkpoint.glob("pytorch_model*"))
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "normfree"


def test_a_folder_with_another_run_is_refused_and_left_alone(
    plain_run: RunResult, data: PackedData, tiny_run: Callable[..., RunConfig]
) -> None:
    before = {path: path.read_bytes() for path in plain_run.folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"another configuration \(recipe.learning_rate: 0.001 there, 0.002 asked"):
        train(tiny_run(learning_rate=0.002), data, plain_run.folder)
    assert {path: path.read_bytes() for path in plain_run.folder.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_files_is_refused(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train(tiny_run(), data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_data_for_one_batch_is_refused(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the training split has 256 sequences, fewer than one batch of 512"):
        train(tiny_run(batch_size=512), data, tmp_path / "run")


def test_a_folder_without_results_holds_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        load_result(tmp_path)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_every_checkpoint_has_its_tokenizer(plain_run: RunResult, data: PackedData) -> None:
    for step in (3, 6):
        tokenizer = AutoTokenizer.from_pretrained(plain_run.folder / f"checkpoint-{step}")
        assert tokenizer.get_vocab() == data.tokenizer.get_vocab()
        text = "def f(x):\n    return x ** 2  # é"
        assert tokenizer(text)["input_ids"] == data.tokenizer(text)["input_ids"]


def test_every_evaluation_sequence_counts_also_those_of_a_last_smaller_batch(
    data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = tiny_run(steps=1, batch_size=5, micro_batch_size=5)
    assert len(data.eval) % 5
    result = train(run, data, tmp_path / "run")
    assert result.row["eval_sequences"] == len(data.eval)
    model = load_pretrained(str(tmp_path / "run")).model
    expected = [evaluation_losses(model, data.eval[i]["input_ids"][None])[0] for i in range(len(data.eval))]
    np.testing.assert_allclose(result.sequence_losses["loss_nats"], expected, rtol=1e-5)


def test_an_attention_implementation_that_the_model_lacks_writes_nothing(
    tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path
) -> None:
    for options in ({"attn_logit_softcapping": 2.0}, {"attention": "spark", "attention_active": 4}):
        with pytest.raises(InputError, match="eager"):
            train(tiny_run(model=options), data, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_with_soft_caps_and_scales(tiny_run: Callable[..., RunConfig], data: PackedData, tmp_path: Path) -> None:
    options = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0, "embedding_multiplier": 4.0}
    result = train(tiny_run(model=options, attn_implementation="eager"), data, tmp_path / "run")
    model = load_pretrained(str(tmp_path / "run")).model
    assert {name: getattr(model.config, name) for name in options} == options
    assert result.head_entropy["entropy_nats"].notna().all()
    sequences = torch.from_numpy(np.asarray(data.eval.tokens, dtype=np.int64))
    assert math.isclose(float(evaluation_losses(model, sequences).mean()), result.row["eval_loss"], rel_tol=1e-4)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_checkpoint_without_a_manifest_that_lacks_a_weight_is_not_taken_up(
    change: str, data: PackedData, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Without a manifest, as older versions wrote them, nothing but the names of the tensors tells."""
    train(tiny_run(), data, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "results.csv").unlink()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    (checkpoint / "checkpoint.json").unlink()
    weights = load_file(checkpoint / "model.safetensors")
    name = next(each for each in weights if "blocks.1" in each)
    if change == "missing":
        del weights[name]
    else:
        weights |= {"model.blocks.7.extra": weights[name].clone()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 tensor {change}"):
        train(tiny_run(), data, tmp_path / "run")
