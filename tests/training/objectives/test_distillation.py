"""Distillation: the divergence in float64, what a run minimises, which teachers are refused, and resuming."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.data import PackedData
from normfree.data.packed_sequences import PackedSequences
from normfree.errors import InputError
from normfree.training import RunConfig, RunResult, load_result, train
from normfree.training.objectives.distillation import DistillationOptions, load_teacher
from normfree.training.run_folder import last_checkpoint

from ..test_telemetry import BatchLog
from ..test_trainer import StopAt, assert_same
from .test_entropy_regularization import metric

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def teacher(data: PackedData, tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> RunResult:
    """A finished run with LayerNorm, trained at a rate that teaches it something in a few steps."""
    from tests.conftest import data_config

    folder = tmp_path_factory.mktemp("teacher") / "run"
    recipe = {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "learning_rate": 0.03}
    run = RunConfig.model_validate(
        {
            "model_name": "tiny",
            "configuration": "SM+LN+G",
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "norm": "layernorm", "activation": "gelu"},
            "data": data_config(corpus_folder),
            "recipe": recipe,
        }
    )
    return train(run, data, folder)


def distilled(run: RunConfig, teacher: object, **options: Any) -> RunConfig:
    content = {**run.model_dump(), "objective": {"kind": "distillation", "teacher": str(teacher), **options}}
    return RunConfig.model_validate(content)


def materialised(model: NormfreeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and entropies [batch, n_layer, n_head] from the attention weights themselves."""
    model.set_attn_implementation("eager")
    outputs = model(tokens, output_attentions=True)
    entropies = [-(p * p.masked_fill(p == 0, 1.0).log()).sum(-1).mean(-1) for p in outputs.attentions]
    return outputs.logits, torch.stack(entropies, dim=1)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.5])
def test_a_run_minimises_the_mixture(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult, entropy_weight: float
) -> None:
    """An independent loop, written out, gives the same losses."""
    run = tiny_run(steps=4, learning_rate=0.01, model={"norm": "none", "activation": "relu"})
    run = distilled(run, teacher.folder, weight=0.7, temperature=3.0, entropy_weight=entropy_weight)
    batches = BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))

    set_seed(run.seed)
    model = NormfreeForCausalLM(run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id))
    teaching = NormfreeForCausalLM.from_pretrained(last_checkpoint(teacher.folder)).eval()
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    expected: dict[str, list[float]] = {"train_loss": [], "cross_entropy_nats": [], "distillation_kl_nats": []}
    mismatches = []
    for step, batch in enumerate(batches.batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (0 if step == 0 else (4 - step) / 3)
        logits, entropy = materialised(model, batch)
        with torch.no_grad():
            teacher_logits, teacher_entropy = materialised(teaching, batch)
        cross_entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        log_p, log_q = ((each[:, :-1].double() / 3.0).log_softmax(-1) for each in (teacher_logits, logits))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        mismatch = ((entropy - teacher_entropy) ** 2).mean()
        loss = 0.3 * cross_entropy + 0.7 * 9.0 * kl + entropy_weight * mismatch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in zip(expected, (loss, cross_entropy, kl), strict=True):
            expected[name].append(value.item())
        mismatches.append(mismatch.item())
    for name, values in expected.items():
        np.testing.assert_allclose(metric(result, name), values, rtol=2e-5)
    seen = metric(result, "entropy_mismatch_nats_squared")
    np.testing.assert_allclose(seen, mismatches if entropy_weight else [], rtol=2e-3, atol=1e-7)


def test_the_student_starts_and_evaluates_like_one_trained_alone(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult
) -> None:
    still = tiny_run(learning_rate=1e-30, weight_decay=0.0)
    alone = train(still, data, tmp_path / "alone")
    student = train(distilled(still, teacher.folder), data, tmp_path / "student")
    assert student.row["eval_loss"] == alone.row["eval_loss"]
    assert metric(student, "eval_loss") == metric(alone, "eval_loss")
    # To rounding: a model that trains alone never has all its logits at once.
    assert metric(student, "cross_entropy_nats") == pytest.approx(metric(alone, "train_loss"), rel=1e-6)


def test_a_student_of_the_teachers_kind_comes_to_resemble_it(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult
) -> None:
    run = tiny_run(steps=30, learning_rate=0.01, logging_steps=10, eval_steps=30, save_steps=30)
    result = train(distilled(run, teacher.folder, weight=1.0, temperature=1.0), data, tmp_path / "run")
    kl = metric(result, "distillation_kl_nats")
    assert kl[-1] < 0.5 * kl[0]
    assert metric(result, "train_loss") == pytest.approx(kl, rel=1e-5)


def test_accumulated_micro_batches_are_one_batch(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult
) -> None:
    results = []
    for micro_batch_size in (8, 2):
        run = tiny_run(steps=4, learning_rate=0.01, batch_size=8, micro_batch_size=micro_batch_size)
        run = distilled(run, teacher.folder, entropy_weight=0.5)
        results.append(train(run, data, tmp_path / str(micro_batch_size)))
    for name in ("train_loss", "distillation_kl_nats", "entropy_mismatch_nats_squared"):
        np.testing.assert_allclose(metric(results[0], name), metric(results[1], name), rtol=1e-4)


def test_a_stopped_run_ends_like_one_never_stopped(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult
) -> None:
    run = distilled(tiny_run(model={"embedding_dropout": 0.1}), teacher.folder, entropy_weight=0.5)
    whole = train(run, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, data, tmp_path / "stopped", callbacks=(StopAt(5),))
    assert_same(whole, train(run, data, tmp_path / "stopped"))


@pytest.mark.parametrize("form", ["masked labels", "stock teacher, tied and soft-capped student"])
def test_only_predicted_tokens_learn_from_any_teacher(
    data: PackedData, tiny_run: Make, tmp_path: Path, form: str
) -> None:
    """The first loss of a run, in float64 from whole logits."""
    torch.manual_seed(0)
    if form == "masked labels":
        predicted = np.random.default_rng(0).random(data.train.tokens.shape) < 0.5
        np.save(tmp_path / "predicted.npy", predicted)
        data = replace(data, train=PackedSequences(data.train.path, tmp_path / "predicted.npy"))
        teaching: Any = NormfreeForCausalLM(
            NormfreeConfig(vocab_size=290, n_positions=16, n_layer=1, n_head=1, n_embd=8, lm_head_bias=True)
        )
        options: dict[str, Any] = {}
    else:
        teaching = GPT2LMHeadModel(GPT2Config(vocab_size=290, n_positions=64, n_layer=1, n_head=1, n_embd=8))
        options = {"tie_word_embeddings": True, "final_logit_softcapping": 2.0}
    with torch.no_grad():
        for each in teaching.parameters():
            each.add_(torch.randn_like(each) * 0.3)
    teaching.eval().save_pretrained(tmp_path / "teacher")
    run = distilled(tiny_run(steps=1, model=options), tmp_path / "teacher", weight=0.6, temperature=1.5)
    batches = BatchLog()
    result = train(run, data, tmp_path / "run", callbacks=(batches,))

    set_seed(run.seed)
    model = NormfreeForCausalLM(run.build_model_config(data.statistics["vocab_size"], data.tokenizer.eos_token_id))
    (batch,) = batches.batches
    with torch.no_grad():
        log_q, log_p = ((each(batch).logits[:, :-1].double() / 1.5).log_softmax(-1) for each in (model, teaching))
        kls = (log_p.exp() * (log_p - log_q)).sum(-1)
    places = [int((data.train.tokens == row.numpy()).all(axis=1).argmax()) for row in batch]
    if data.train.predicted is not None:
        kls = kls[torch.from_numpy(data.train.predicted[places][:, 1:])]
    np.testing.assert_allclose(metric(result, "distillation_kl_nats"), [kls.mean().item()], rtol=2e-5)
    cross_entropy, loss = (metric(result, name)[0] for name in ("cross_entropy_nats", "train_loss"))
    assert loss == pytest.approx(0.4 * cross_entropy + 0.6 * 1.5**2 * kls.mean().item(), rel=2e-5)


def test_a_relative_teacher_starts_at_the_runs_folder(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult
) -> None:
    shutil.copytree(teacher.folder, tmp_path / "study" / "teacher")
    run = distilled(tiny_run(steps=2), "../teacher")
    result = train(run, data, tmp_path / "study" / "student")
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["objective"]["teacher"] == "../teacher"
    (tmp_path / "study").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "teacher")
    moved = train(run, data, tmp_path / "moved" / "student", callbacks=(StopAt(0),))
    assert moved.row == result.row


def saved(folder: Path, **options: Any) -> Path:
    sizes = {"vocab_size": 290, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "activation": "gelu"}
    NormfreeForCausalLM(NormfreeConfig(**{**sizes, **options})).save_pretrained(folder)
    return folder


def test_any_causal_language_model_teaches(tmp_path: Path, teacher: RunResult) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=290, n_positions=64, n_layer=3, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    student = NormfreeConfig(vocab_size=290, n_positions=16, n_layer=2, n_head=2, n_embd=16)
    model = load_teacher(tmp_path, student, same_heads=False)
    assert isinstance(model, GPT2LMHeadModel)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    checkpoint = last_checkpoint(teacher.folder)
    assert checkpoint is not None
    assert isinstance(load_teacher(checkpoint, student, same_heads=True), NormfreeForCausalLM)


def folder_of(case: str, place: Path, teacher: RunResult) -> Path:
    if case == "missing":
        return place / "nowhere"
    if case == "no model":
        (place / "thesis.txt").write_text("years of work")
        return place
    if case == "other vocabulary":
        return saved(place, vocab_size=300)
    if case == "few positions":
        return saved(place, n_positions=8)
    if case == "other heads":
        return saved(place, n_head=4)
    if case == "damaged":
        saved(place)
        (place / "model.safetensors").write_bytes(b"half")
        return place
    if case == "pickled":
        torch.save(NormfreeForCausalLM.from_pretrained(saved(place)).state_dict(), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
        return place
    run = place / "run"
    shutil.copytree(teacher.folder, run)
    if case == "unfinished":
        (run / "results.csv").unlink()
    else:
        results = pd.read_csv(run / "results.csv").assign(status="diverged")
        results.to_csv(run / "results.csv", index=False)
    return run


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "there is no folder .*nowhere; give a finished run or a model folder"),
        ("no model", "is neither a model folder .* nor a finished run"),
        ("other vocabulary", "has a vocabulary of 300 tokens, the student one of 290"),
        ("few positions", "has 8 positions, fewer than the 16 tokens of a sequence"),
        ("other heads", "has 2 layers of 4 heads and the student 2 of 2"),
        ("damaged", "cannot load"),
        ("pickled", "cannot load"),
        ("unfinished", r"results.csv or its checkpoint is missing\); train the teacher to its end first"),
        ("diverged", "is diverged; give one with finite weights"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    data: PackedData, tiny_run: Make, tmp_path: Path, teacher: RunResult, case: str, message: str
) -> None:
    place = tmp_path / "teacher"
    place.mkdir()
    run = distilled(tiny_run(), folder_of(case, place, teacher), entropy_weight=1.0)
    with pytest.raises(InputError, match=message) as refusal:
        train(run, data, tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="holds no finished run"):
        load_result(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight: Input should be greater than 0"),
        ({"weight": 1.5}, "weight: Input should be less than or equal to 1"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"entropy_weight": -1.0}, "entropy_weight: Input should be greater than or equal to 0"),
        ({"teacher": ""}, "teacher: String should have at least 1 character"),
        ({"temprature": 1.0}, r"unknown option 'temprature' \(did you mean 'temperature'\?\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(tiny_run: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        distilled(tiny_run(), **{"teacher": "there", **options})


def test_a_teacher_has_to_be_named(tiny_run: Make) -> None:
    with pytest.raises(ValidationError, match="teacher: Field required"):
        RunConfig.model_validate({**tiny_run().model_dump(), "objective": {"kind": "distillation"}})
    assert distilled(tiny_run(), "there").objective == DistillationOptions(teacher="there")
