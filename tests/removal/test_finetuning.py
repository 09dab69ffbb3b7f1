"""A removal from end to end on small trained models: tables, exports, stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from normfree import NormfreeConfig, NormfreeForCausalLM, from_hf
from normfree.data import prepare_data
from normfree.errors import InputError
from normfree.removal import removal, remove
from normfree.removal.finetuning import (
    check_fit,
    remove_by_finetuning,
)
from normfree.removal.layout import REMOVAL_FILE
from normfree.removal.midway import Midway
from normfree.removal.parts import QKNorms, parts_to_remove
from normfree.removal.schedule import (
    automatic_schedule,
    load_schedule,
    pretrained_schedule,
)
from normfree.removal.std_losses import StdLosses
from normfree.training.lora import LoraOptions
from tests.stop_at import StopAt

from ..modeling.test_no_norm_op import NORMALIZING, ops_of
from .models import STOCK, scheduled, stock, tokens
from .small_removals import STEPS, T, corpus, gpt2, run_from, weights

__all__ = ["corpus", "gpt2"]


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


OTHER_NORMS: dict[str, dict[str, Any]] = {
    "sandwich": {"norm_placement": "sandwich", "qk_norm": "rmsnorm", "norm": "rmsnorm", "final_norm": "rmsnorm"},
    "scaled": {"norm": "layernorm_scaling"},
    "post": {"norm_placement": "post", "norm": "rmsnorm", "final_norm": "none"},
}


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


@pytest.mark.parametrize("stops", [(6, 7), (9,), (11, 12, 14)])
def test_ramps_and_measured_tokens_resume_to_the_same_weights(
    gpt2: Path, corpus: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Stopped within ramps, between removals, after the last one and after its ramp."""
    run = run_from(str(gpt2), corpus, save_steps=1)
    data = prepare_data(run.data, tmp_path / "cache")
    config = from_hf(GPT2LMHeadModel.from_pretrained(gpt2)).config
    options = {
        "ramp_steps": 2,
        "special_ramp_steps": 3,
        "special_factor": 1.1,
        "massive_steps": 1,
        "std_loss_ramp_steps": 8,
    }
    schedule = pretrained_schedule(3, STEPS).model_copy(update=options)
    assert [schedule.removals(config)[-1].step, schedule.last_step(config)] == [10, 12]
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
    check_fit(run, schedule.model_copy(update={"special_ramp_steps": STEPS - last}), config)
    with pytest.raises(InputError, match=r"is at step \d+ with a ramp of \d+ steps, and the budget ends after 16"):
        check_fit(run, schedule.model_copy(update={"special_ramp_steps": STEPS - last + 1}), config)


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
