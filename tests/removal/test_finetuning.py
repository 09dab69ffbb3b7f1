"""A removal from end to end on small trained models: tables, exports, stops, divergence, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, GPT2LMHeadModel

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf
from normfree.data import PackedData, prepare_data
from normfree.errors import InputError
from normfree.removal import finetuning, removal, remove
from normfree.removal.finetuning import (
    REMOVAL_FILE,
    DivergedError,
    RemovalDivergedError,
    RemoveNorms,
    check_fit,
    remove_by_finetuning,
)
from normfree.removal.midway import Midway
from normfree.removal.parts import QKNorms, parts_to_remove
from normfree.removal.plan import RECIPE, plan
from normfree.removal.schedule import (
    PRETRAINED_RECIPE,
    Removal,
    RemovalSchedule,
    automatic_schedule,
    load_schedule,
    pretrained_schedule,
)
from normfree.removal.std_losses import StdLosses
from normfree.training import Callback, RunConfig, RunResult, RunState
from normfree.training.lora import LoraOptions
from normfree.training.objectives import CROSS_ENTROPY

from ..modeling.test_no_norm_op import NORMALIZING, ops_of
from .models import STOCK, scheduled, stock, tokens

Command = Callable[..., tuple[int, str, str]]
T, STEPS = 24, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice(["def", "return", "x", "y", "+", "for", "in", "range"], (400, 40))
    for number, row in enumerate(words):
        (folder / f"{number}.py").write_text(" ".join(row) + "\n")
    return folder


def run_from(model: str, corpus: Path, **recipe: Any) -> RunConfig:
    options: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 4,
        "micro_batch_size": 4,
        "precision": "fp32",
        "learning_rate": 1e-3,
    }
    every = {"logging_steps": 1, "telemetry_steps": 5, "save_steps": 4, "eval_steps": 100}
    data = {"corpus": f"directory:{corpus}", "vocab_size": 270, "sequence_length": T, "eval_tokens": 20 * T}
    return RunConfig.model_validate(
        {
            "model_name": "small",
            "configuration": "any",
            "model": {},
            "data": data,
            "recipe": options | every | recipe,
            "start_from": model,
        }
    )


@pytest.fixture(scope="module", params=list(STOCK))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model whose vocabulary holds the corpus'."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    small = STOCK[request.param]()
    small.resize_token_embeddings(270)
    small.save_pretrained(folder)
    return folder


def loss_of(model: Any, sequences: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model.eval()(input_ids=sequences).logits.double()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), sequences[:, 1:].flatten()))


def test_from_a_stock_model_to_one_without_norms(model: Path, corpus: Path, tmp_path: Path) -> None:
    run = run_from(str(model), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    result = remove(run, data, tmp_path / "out", None)
    assert result.table["variant"].tolist() == ["original", "vanilla", "norm-free"]
    assert result.table["finetuning_tokens"].tolist() == [0, STEPS * 4 * T, STEPS * 4 * T]

    sequences = torch.from_numpy(np.asarray(data.eval.tokens, dtype=np.int64))
    norm_free: Any = AutoModelForCausalLM.from_pretrained(result.norm_free)
    assert type(norm_free) is NormfreeForCausalLM
    assert ops_of(norm_free) & NORMALIZING == set()
    assert AutoTokenizer.from_pretrained(result.norm_free)("def x") == data.tokenizer("def x")
    original = AutoModelForCausalLM.from_pretrained(model)
    losses = result.table.set_index("variant")["eval_loss"]
    np.testing.assert_allclose(losses["original"], loss_of(original, sequences), rtol=1e-5)
    np.testing.assert_allclose(losses["norm-free"], loss_of(norm_free, sequences), rtol=1e-5)
    assert losses["norm-free"] < losses["original"], "the corpus has eight words"

    assert result.stock is not None
    exported = AutoModelForCausalLM.from_pretrained(result.stock)
    assert type(exported) is type(original)
    np.testing.assert_allclose(loss_of(exported, sequences), losses["norm-free"], rtol=1e-4)
    again = remove(run, data, tmp_path / "out", None)
    pd.testing.assert_frame_equal(again.table, result.table)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def end_step(self, run: RunState) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    small = stock("gpt2")
    small.resize_token_embeddings(270)
    small.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return finetuning.constant_std_model(folder).state_dict()


OTHER_NORMS: dict[str, dict[str, Any]] = {
    "sandwich": {"norm_placement": "sandwich", "qk_norm": "rmsnorm", "norm": "rmsnorm", "final_norm": "rmsnorm"},
    "scaled": {"norm": "layernorm_scaling"},
    "post": {"norm_placement": "post", "norm": "rmsnorm", "final_norm": "none"},
}


@pytest.mark.parametrize("qk_norms", ["keep", "remove"])
def test_the_command_keeps_or_removes_qk_norms(qk_norms: str, normfree: Command, corpus: Path, tmp_path: Path) -> None:
    """A model that is no run, so by the schedule for pretrained ones."""
    options: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 270, "hidden_size": 32}
    options |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": T}
    options |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**options)).save_pretrained(tmp_path / "gemma")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270", "--steps", "30"]
    size += ["--set", f"data.sequence_length={T}", "--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4"]
    code, out, err = normfree(
        "remove-norm", tmp_path / "gemma", *size, "--qk-norms", qk_norms, "--no-vanilla", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    parts = set(pd.read_csv(Path(found["folder"]) / "removal" / "norm-costs.csv")["part"])
    block_parts = {"ffn", "attention_qk", "attention_v", "ffn_output", "attention_output", "final"}
    assert parts == block_parts | ({"qk_norm"} if qk_norms == "remove" else set())
    norm_free: Any = AutoModelForCausalLM.from_pretrained(found["norm_free"])
    assert norm_free.config.qk_norm == ("none" if qk_norms == "remove" else "rmsnorm")
    if qk_norms == "keep":
        assert found["stock"] is None
        assert "qk_norm = 'rmsnorm' has no counterpart in Gemma 3: its norms share one ε" in err
    else:
        stock_model: Any = AutoModelForCausalLM.from_pretrained(found["stock"])
        assert type(stock_model) is Gemma3ForCausalLM


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_other_norms_go_and_a_stopped_removal_resumes(name: str, corpus: Path, tmp_path: Path) -> None:
    rotary: dict[str, Any] = {"position": "rotary", "ffn": "gated", "attention_bias": "none", "mlp_bias": False}
    sizes: dict[str, Any] = {
        "vocab_size": 270,
        "n_positions": T,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 16,
    }
    torch.manual_seed(0)
    NormfreeForCausalLM(NormfreeConfig(**sizes, **rotary, **OTHER_NORMS[name])).save_pretrained(tmp_path / "model")
    run = run_from(str(tmp_path / "model"), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    config: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    qk_norms: QKNorms = "keep" if config.qk_norm == "none" else "remove"
    schedule = automatic_schedule(2, STEPS, parts_to_remove(config, qk_norms), qk_norms)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = remove(run, data, whole, schedule, vanilla=False)
    norm_free: Any = AutoModelForCausalLM.from_pretrained(result.norm_free)
    assert not any("norm" in each for each in norm_free.state_dict())
    assert ops_of(norm_free) & NORMALIZING == set()
    sequences = torch.from_numpy(np.asarray(data.eval.tokens, dtype=np.int64))
    losses = result.table.set_index("variant")["eval_loss"]
    np.testing.assert_allclose(losses["norm-free"], loss_of(norm_free, sequences), rtol=1e-5)
    assert losses["norm-free"] < losses["original"], "the corpus has eight words"
    assert (result.stock is None) == (name == "scaled"), "Llama has no LayerNorm before its unembedding"
    if result.stock is not None:
        exported = AutoModelForCausalLM.from_pretrained(result.stock)
        assert type(exported).__name__ == "LlamaForCausalLM"
        np.testing.assert_allclose(loss_of(exported, sequences), losses["norm-free"], rtol=1e-4)

    with pytest.raises(KeyboardInterrupt):
        remove_by_finetuning(
            run.model_copy(update={"configuration": "norm-free"}), data, parts, schedule, config, callbacks=(StopAt(6),)
        )
    remove_by_finetuning(run.model_copy(update={"configuration": "norm-free"}), data, parts, schedule, config)
    expected, actual = weights(whole / "removal"), weights(parts)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key


def test_a_stopped_removal_goes_on_to_the_same_weights(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, STEPS)
    remove_by_finetuning(run, data, tmp_path / "whole", schedule, config)
    with pytest.raises(KeyboardInterrupt):
        remove_by_finetuning(run, data, tmp_path / "parts", schedule, config, callbacks=(StopAt(6),))
    remove_by_finetuning(run, data, tmp_path / "parts", schedule, config)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("stops", [(6, 7), (9,), (13, 14, 15)])
def test_ramps_and_measured_tokens_resume_to_the_same_weights(
    gpt2: Path, corpus: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Stopped within ramps, between removals, after the last one and after its ramp."""
    run = run_from(str(gpt2), corpus, save_steps=1)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    options = {"ramp_steps": 3, "special_factor": 1.1, "massive_steps": 3, "std_loss_ramp_steps": 8}
    schedule = pretrained_schedule(3, STEPS).model_copy(update=options)
    assert [schedule.removals(config)[-1].step, schedule.last_step(config)] == [13, 15]
    remove_by_finetuning(run, data, tmp_path / "whole", schedule, config)
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            remove_by_finetuning(run, data, tmp_path / "parts", schedule, config, callbacks=(StopAt(step),))
    remove_by_finetuning(run, data, tmp_path / "parts", schedule, config)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    tables = [pd.read_parquet(tmp_path / each / "metrics.parquet") for each in ("whole", "parts")]
    losses = [table[table["name"].str.contains("loss|ratio|nats|std")] for table in tables]
    assert {"massive_log_ratio_squared", "largest_std_over_median", "residual_std_mismatch"} <= set(losses[0]["name"])
    for column in ("step", "name", "value"):
        assert losses[0][column].tolist() == losses[1][column].tolist()


def test_a_ramp_must_end_within_the_budget(gpt2: Path, corpus: Path) -> None:
    run = run_from(str(gpt2), corpus)
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = pretrained_schedule(3, STEPS)
    last = schedule.removals(config)[-1].step
    check_fit(run, schedule.model_copy(update={"ramp_steps": STEPS - last}), config)
    with pytest.raises(InputError, match=r"is at step \d+ with a ramp of \d+ steps, and the budget ends after 16"):
        check_fit(run, schedule.model_copy(update={"ramp_steps": STEPS - last + 1}), config)


@pytest.mark.parametrize(
    ("options", "recipe", "message"),
    [
        ({"stages": [{"part": "ffn", "after": 0}]}, {}, "removes ffn of layer 0 before the first step; begin after"),
        ({"massive_weight": 0.1}, {"gradient_checkpointing": True}, "keeps no stds inside blocks"),
        ({"std_loss_norms": "all", "std_loss_weight": 1.0}, {"gradient_checkpointing": True}, "keeps no stds"),
    ],
)
def test_schedules_that_a_run_cannot_follow(
    gpt2: Path, corpus: Path, options: dict[str, Any], recipe: dict[str, Any], message: str
) -> None:
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    if "stages" in options:
        options = {"stages": [*options["stages"], *scheduled().model_dump()["stages"][1:]]}
    with pytest.raises(InputError, match=message):
        check_fit(run_from(str(gpt2), corpus, steps=300, **recipe), scheduled(**options), config)


def test_a_removal_that_diverges_goes_back_and_waits_longer(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tolerance below zero the first removal is taken for a jump, until it is raised again."""
    run = run_from(str(gpt2), corpus, steps=40)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, 40)
    jumps = iter([-100.0])
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    back = finetuning._go_back

    def go_back(folder: Path, step: int) -> int:
        finetuning.MAX_JUMP = next(jumps) + 200
        return back(folder, step)

    monkeypatch.setattr(finetuning, "_go_back", go_back)
    remove_by_finetuning(run, data, tmp_path / "run", schedule, config)
    (stretch,) = json.loads((tmp_path / "run" / REMOVAL_FILE).read_text())["stretches"]
    first = schedule.removals(config)[0].step
    assert stretch["step"] <= first
    assert "after the removal of ffn of layer 0" in stretch["jump"]
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    losses = metrics[metrics["name"] == "cross_entropy_nats"]
    assert losses["step"].tolist() == list(range(1, 41))


def watch(
    losses: list[float],
    *,
    removals: tuple[int, ...] = (12, 14),
    history: list[float] | None = None,
    max_steps: int = 0,
) -> int | None:
    """The step of the removal that a run of these losses, after those of its history, is said to have diverged by."""

    class Gone:
        gone: ClassVar[list[Removal]] = []

        schedule = RemovalSchedule(stages=())

        def apply(self, removal: Removal) -> None:
            pass

        def begin_step(self, step: int) -> None:
            pass

        def finish(self) -> None:
            pass

    midway: Any = Gone()
    callback = RemoveNorms(midway, [Removal(step, "ffn", layer) for layer, step in enumerate(removals)])
    earlier = list(enumerate(history or [], start=1))

    class Records:
        def metric(self, name: str) -> list[tuple[int, float]]:
            assert name == CROSS_ENTROPY
            return earlier

    records: Any = Records()
    state = RunState(midway, records, n_steps=max_steps, step=len(earlier))
    try:
        callback.begin(state)
        for loss in losses:
            state.step += 1
            callback.log(state, {CROSS_ENTROPY: loss})
        callback.finish(state)
    except DivergedError as jump:
        return jump.removal.step
    return None


def test_one_bad_batch_is_no_divergence() -> None:
    assert watch([2.0] * 13 + [2.5, 70.0, 2.2, 3.1, 3.2, 3.3, 3.4, 2.9]) is None, "not for five steps in a row"


@pytest.mark.parametrize("seen", [0, 8, 15, 16])
def test_a_jump_that_stays_is_blamed_on_the_removal_it_began_with(seen: int) -> None:
    """Wherever the run was stopped and resumed."""
    losses = [2.0] * 13 + [3.1] * 5
    assert watch(losses[seen:], history=losses[:seen]) == 12
    assert watch([2.0] * 14 + [3.1] * 5) == 14


def test_a_jump_at_the_end_and_a_nan_are_divergence_at_once() -> None:
    assert watch([2.0] * 14 + [3.1], max_steps=15) == 14
    assert watch([2.0] * 14 + [3.1], max_steps=16) is None, "stopped before its end"
    assert watch([2.0] * 13 + [math.nan, 2.0, 2.0]) == 12
    assert watch([2.0] * 13 + [math.inf, 2.0, 2.0]) == 12
    assert watch([2.0, 2.0], removals=(0,)) == 0, "nothing to compare with"


def test_stds_that_are_not_finite_are_divergence() -> None:
    """The message names the norm; what made them so began with a removal, even if no loss has said so yet."""
    midway = Midway(from_hf(stock("gpt2")), scheduled())
    removals = [Removal(3, "ffn", 0), Removal(5, "attention_qk", 1)]
    callback = RemoveNorms(midway, removals)
    records: Any = None
    run = RunState(midway.model, records, n_steps=9, step=2)
    midway.model.train()(tokens())
    run.step = 3
    callback.end_step(run)
    callback.begin_step(run)
    with torch.no_grad():
        midway.model.model.blocks[1].attention.o_proj.weight[0] = math.inf
    midway.model(tokens())
    run.step = 4
    where = "before the ffn norm of layer 1 at step 4 after the removal of ffn of layer 0"
    with pytest.raises(DivergedError, match=f"a std that is not finite {where}") as diverged:
        callback.end_step(run)
    assert diverged.value.removal == removals[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_norm_that_is_gone_is_watched_too(value: float, is_gone: bool) -> None:
    midway = Midway(from_hf(stock("llama")), scheduled())
    midway.model.train()(tokens())
    if is_gone:
        midway.apply(Removal(3, "final", None))
    with torch.no_grad():
        midway.model.model.blocks[-1].ffn.down_proj.weight[0] = value
    midway.begin_step(4)
    assert midway.overflow() is None, "nothing has been seen in this step"
    midway.model(tokens())
    midway.model(tokens()[:1])
    assert midway.overflow() == "the final norm"


def test_divergence_before_any_removal_is_no_early_schedule(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    run = run_from(str(gpt2), corpus, learning_rate=1e30, warmup_ratio=0.0)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, STEPS).model_copy(update={"massive_steps": 3})
    with pytest.raises(RemovalDivergedError, match=r"before any removal; lower recipe.learning_rate") as error:
        remove_by_finetuning(run, data, tmp_path / "run", schedule, config)
    assert "begin" not in str(error.value)


def test_a_removal_that_never_settles_is_bad_input(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    with pytest.raises(InputError, match=r"last removal \(first_token\) is at step \d+, and the budget ends after 16"):
        remove_by_finetuning(run, data, tmp_path / "run", automatic_schedule(3, STEPS), config)


def test_a_removal_that_diverged_for_good_leaves_a_table(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    monkeypatch.setattr(finetuning, "MAX_JUMP", -100.0)
    with pytest.raises(RemovalDivergedError, match="after a jump of the loss"):
        remove(run, data, tmp_path / "out", None, vanilla=False)
    table = pd.read_csv(tmp_path / "out" / "removal.csv").set_index("variant")
    assert np.isfinite(table["eval_loss"]["original"])
    assert np.isnan(table.loc["norm-free", ["eval_loss", "eval_ppl", "delta_loss"]].to_numpy(dtype=float)).all()
    assert not (tmp_path / "out" / "norm-free").exists()


def test_low_rank_changes_go_into_plain_exports(gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = run_from(str(gpt2), corpus).model_copy(update={"lora": LoraOptions(rank=4)})
    data = prepare_data(run.data, tmp_path / "cache")
    result = remove(run, data, tmp_path / "out", None)
    losses = result.table.set_index("variant")["eval_loss"]
    sequences = torch.from_numpy(np.asarray(data.eval.tokens, dtype=np.int64))
    assert result.stock is not None
    for folder in (result.norm_free, result.stock):
        exported = AutoModelForCausalLM.from_pretrained(folder)
        assert not any("lora" in name for name in exported.state_dict())
        np.testing.assert_allclose(loss_of(exported, sequences), losses["norm-free"], rtol=1e-4)
    assert losses["norm-free"] < losses["original"], "the corpus has eight words"
    start = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).state_dict()
    for folder in (tmp_path / "out" / "removal", tmp_path / "out" / "vanilla"):
        end = weights(folder)
        assert torch.equal(end["model.embed_tokens.weight"], start["model.embed_tokens.weight"]), "frozen"
        up = end["model.blocks.0.ffn.up_proj.weight"] - start["model.blocks.0.ffn.up_proj.weight"]
        assert torch.linalg.matrix_rank(up.double(), rtol=1e-4) == 4


def test_a_stopped_removal_with_low_rank_changes_goes_on_to_the_same_weights(
    gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    run = run_from(str(gpt2), corpus).model_copy(update={"lora": LoraOptions(rank=2, alpha=8)})
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    schedule = automatic_schedule(3, STEPS)
    remove_by_finetuning(run, data, tmp_path / "whole", schedule, config)
    with pytest.raises(KeyboardInterrupt):
        remove_by_finetuning(run, data, tmp_path / "parts", schedule, config, callbacks=(StopAt(6),))
    with pytest.raises(InputError, match="removable"):
        weights(tmp_path / "parts")
    remove_by_finetuning(run, data, tmp_path / "parts", schedule, config)
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_the_folder_says_when_each_norm_went_and_keeps_to_its_schedule(
    gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")
    schedule = automatic_schedule(3, STEPS)
    result = remove(run, data, tmp_path / "out", schedule, vanilla=False)
    assert load_schedule(str(tmp_path / "out" / "schedule.yaml")) == schedule
    removals = json.loads((tmp_path / "out" / "removal" / REMOVAL_FILE).read_text())["removals"]
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    assert [tuple(each.values()) for each in removals] == [tuple(each) for each in schedule.removals(config)]
    with pytest.raises(InputError, match=r"holds a removal by another schedule"):
        remove(run, data, tmp_path / "out", schedule.model_copy(update={"std_loss_weight": 0.5}), vanilla=False)
    assert result.norm_free.is_dir()


def test_an_export_that_is_killed_leaves_nothing_at_its_place(
    gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_from(str(gpt2), corpus)
    data = prepare_data(run.data, tmp_path / "cache")

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert list(folder.glob("*.safetensors")), "the weights are written before the tokenizer"
            raise KeyboardInterrupt

    export = removal._export

    def interrupted(model: Any, data: Any, folder: Path) -> None:
        export(model, replace(data, tokenizer=Tokenizer()), folder)

    with monkeypatch.context() as patch:
        patch.setattr(removal, "_export", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(run, data, tmp_path / "out", None, vanilla=False)
    assert not {"norm-free", "gpt2", "removal.csv"} & {path.name for path in (tmp_path / "out").iterdir()}
    result = remove(run, data, tmp_path / "out", None, vanilla=False)
    assert AutoTokenizer.from_pretrained(result.norm_free)("def x") == data.tokenizer("def x")


def test_the_std_loss_in_float64() -> None:
    midway = Midway(from_hf(stock("gpt2")).double(), scheduled(std_loss_weight=0.5))
    objective = StdLosses(midway)
    ids = tokens()
    midway.model(ids, output_hidden_states=False)
    term = objective.terms(None, None)["residual_std_mismatch"]
    with torch.no_grad():
        streams: list[torch.Tensor] = []
        hook = midway.model.model.blocks[-1].register_forward_hook(lambda _, inputs, output: streams.append(output))
        midway.model(ids)
        hook.remove()
    x = streams[0].numpy()
    std = np.sqrt(x.var(-1) + 1e-5)
    special = (ids == 2).numpy()
    special[:, 0] = True
    expected = ((std - std[~special].mean()) ** 2).mean()
    np.testing.assert_allclose(term.value.item(), expected, rtol=1e-10)
    assert term.weight == 0.5
    term.value.backward()
    assert midway.model.model.blocks[0].ffn.down_proj.weight.grad.abs().sum() > 0
    assert StdLosses(Midway(from_hf(stock("gpt2")), scheduled())).terms(None, None) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--schedule", "gpt2", "--steps", "30"],
            "last removal (first_token) is at step 53, and the budget ends after 30",
        ),
        (["--schedule", "gpt3"], "unknown removal schedule 'gpt3'"),
        (["--schedule", "twice.yaml"], "the schedule removes final twice; name it once"),
        (["--set", "recipe.learning_rates=1"], "unknown option 'recipe.learning_rates'"),
        (["--set", "lr=1"], "unknown option 'lr' (did you mean 'recipe.learning_rate'?)"),
        (["--set", "recipe.logging_steps=2"], "set recipe.logging_steps to 1, not 2"),
        (["--set", "lora.alpha=2"], "unknown option 'lora.alpha'"),
        (["--lora", "2", "--set", "lora.dropout=1"], "unknown option 'lora.dropout'"),
        (["--qk-norms", "remove"], "qk_norms is remove, and the model's qk_norm is none; leave it out"),
        (["--lora", "0"], "Invalid value for '--lora'"),
        (["--tokens", "9", "--steps", "9"], "give --tokens or --steps, not both"),
    ],
)
def test_bad_input_writes_nothing(
    arguments: list[str], message: str, normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path
) -> None:
    stage = "{part: final, after: 2}"
    (tmp_path / "twice.yaml").write_text(f"stages: [{stage}, {stage}]")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270"]
    size += ["--set", "data.sequence_length=24", "--set", "recipe.batch_size=4", "--set", "recipe.micro_batch_size=4"]
    code, _, err = normfree("remove-norm", gpt2, *size, "--out", "out", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_run_of_ours_takes_another_tokenizer_with_its_vocabulary(
    plain_run: RunResult, tiny_run: Callable[..., RunConfig], data: PackedData
) -> None:
    model = str(plain_run.folder)
    planned = plan(model, changes={}, seed=3)
    assert (planned.run.data, planned.run.seed) == (tiny_run().data, 3)
    assert planned.fingerprint == data.fingerprint, "on the very tokens it was trained on"
    changed = plan(model, changes={"data.tokenizer": "gpt2"}, seed=0)
    assert (changed.run.data.tokenizer, changed.fingerprint) == ("gpt2", None)
    assert changed.run.recipe.batch_size == tiny_run().recipe.batch_size
    low_rank = plan(model, changes={"lora.alpha": 3}, seed=0, lora_rank=6)
    assert low_rank.run.lora == LoraOptions(rank=6, alpha=3)


def test_a_schedule_brings_its_recipe(
    plain_run: RunResult, tiny_run: Callable[..., RunConfig], gpt2: Path, corpus: Path
) -> None:
    published = load_schedule("gpt2-xl")
    changes = {"data.corpus": f"directory:{corpus}", "data.tokenizer": "train"}
    recipe = plan(str(gpt2), changes=changes, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.decay_steps, recipe.warmup_steps) == (800, 1200, 20)
    assert (recipe.learning_rate, recipe.final_learning_rate_ratio, recipe.batch_size) == (1e-4, 0.2, 512)
    given = {**changes, "recipe.learning_rate": 3e-4, "recipe.steps": 900}
    recipe = plan(str(gpt2), changes=given, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.learning_rate, recipe.decay_steps) == (900, 3e-4, 1200)
    recipe = plan(str(plain_run.folder), changes={}, seed=0, schedule=published).run.recipe
    assert (recipe.steps, recipe.batch_size) == (800, tiny_run().recipe.batch_size)


def test_default_schedules_are_for_runs_and_for_other_models(plain_run: RunResult, gpt2: Path, corpus: Path) -> None:
    changes: dict[str, Any] = {"data.corpus": f"directory:{corpus}", "data.tokenizer": "train"}
    pretrained = plan(str(gpt2), changes=changes, seed=0)
    assert pretrained.schedule == pretrained_schedule(3, 300)
    assert (pretrained.run.recipe.learning_rate, pretrained.run.recipe.steps) == (PRETRAINED_RECIPE.learning_rate, 300)
    assert plan(str(gpt2), changes=changes | {"recipe.learning_rate": 1e-5}, seed=0).run.recipe.learning_rate == 1e-5
    own = plan(str(plain_run.folder), changes={}, seed=0)
    assert (own.schedule.order, own.schedule.special_tokens) == ("published", "separate")
    assert own.run.recipe.learning_rate == RECIPE["learning_rate"]


def test_models_that_cannot_be_removed_from(normfree: Command, gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    code, _, err = normfree("remove-norm", gpt2)
    assert code == 2
    assert "name a corpus to fine-tune on with --corpus" in err
    options: dict[str, Any] = {"norm": "none", "final_norm": "none", "n_positions": 24}
    free = NormfreeForCausalLM(NormfreeConfig(vocab_size=270, n_layer=1, n_head=2, n_embd=8, **options))
    free.save_pretrained(tmp_path / "free")
    size = ["--corpus", f"directory:{corpus}", "--tokenizer", "train", "--set", "data.vocab_size=270"]
    code, _, err = normfree("remove-norm", tmp_path / "free", *size, "--set", "data.sequence_length=24")
    assert code == 2
    assert "the model has no norm to remove" in err
