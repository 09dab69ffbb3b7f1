"""Fine-tuning, removal and distillation read sequences that begin as the model's tokenizer begins a text."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from normfree.data import DataConfig, prepare_data
from normfree.errors import InputError
from normfree.modeling import from_hf
from normfree.training import Recipe, RunConfig, load_run_config, train
from tests.data.beginnings import TEMPLATES, saved, tiny_llama

T = 24
QUICK = {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"}
SET = [word for name, value in QUICK.items() if name != "steps" for word in ("--set", f"recipe.{name}={value}")]
SET += [
    "--set",
    f"data.sequence_length={T}",
    "--set",
    "data.eval_fraction=0.3",
    "--set",
    "data.eval_tokens=2400",
    "--steps",
    "2",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("both", "several", "suffix"):
        tiny_llama().save_pretrained(folder / name)
        saved(folder / name, TEMPLATES[name][0])
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, corpus_folder):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"def f{i}(self): ", "completion": f"return value {i} " * (1 + i % 4)} for i in range(120)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"text": f"directory:{corpus_folder}", "pairs": f"pairs:{path}"}


def packed(run_folder, cache):
    run = load_run_config(run_folder / "config.yaml")
    return run, prepare_data(run.data, cache)


@torch.no_grad()
def mean_loss_behind(model, tokens, labels):
    """The mean loss in float64 of the labels that are not -100, by PyTorch's own cross-entropy."""
    logits = model.double()(input_ids=tokens).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100).item()


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("name", ["both", "several"])
def test_finetuning_begins_every_sequence_and_predicts_no_beginning(kind, name, models, corpora, normfree, tmp_path):
    cache = tmp_path / "cache"
    arguments = ("--corpus", corpora[kind], "--out", tmp_path / "run", "--cache-dir", cache, *SET, "--json")
    code, out, err = normfree("finetune", models / name, *arguments)
    assert code == 0, err
    beginning = TEMPLATES[name][1]
    assert json.loads(out)["beginning"]["token_ids"] == list(beginning)
    run, data = packed(tmp_path / "run", cache)
    assert run.data.beginning == "tokenizer"
    items = data.eval.__getitems__(list(range(len(data.eval))))
    tokens, labels = (torch.stack([item[key] for item in items]) for key in ("input_ids", "labels"))
    assert (tokens[:, : len(beginning)] == torch.tensor(beginning)).all()
    assert (labels[torch.isin(tokens, torch.tensor([300, 301]))] == -100).all()
    # Every pair and every document after the first begins anew, behind the end-of-text token of the one before.
    ends = (tokens[:, :-1] == 302).nonzero()
    inside = ends[ends[:, 1] < T - 2]
    assert len(inside)
    assert (tokens[inside[:, 0], inside[:, 1] + 1] == beginning[0]).all()


def test_no_bos_and_tokenizers_that_add_none_leave_everything_as_it_was(models, corpora, normfree, tmp_path):
    cache, fingerprints = tmp_path / "cache", set()
    for name, options in {"both": ("--no-bos",), "suffix": ()}.items():
        out = tmp_path / name
        arguments = ("--corpus", corpora["text"], "--out", out, "--cache-dir", cache, *SET, *options)
        code, text, err = normfree("finetune", models / name, *arguments)
        assert code == 0, err
        assert "no beginning-of-text token" in " ".join(text.split())
        assert "beginning" not in (out / "config.yaml").read_text()
        fingerprints.add(packed(out, cache)[1].train.tokens.tobytes())
    assert len(fingerprints) == 1
    code, _, err = normfree("finetune", models / "suffix", *arguments[:2], "--out", tmp_path / "suffix", *SET, "--bos")
    assert code == 2
    assert "holds a run of another configuration" in err


@pytest.mark.parametrize("name", ["both", "several"])
def test_removal_measures_what_follows_the_beginning(name, corpora, normfree, tmp_path):
    cache, model = tmp_path / "cache", tmp_path / "model"
    tiny_llama(0.02).save_pretrained(model)
    saved(model, TEMPLATES[name][0])
    arguments = (
        "--corpus",
        corpora["text"],
        "--out",
        tmp_path / "out",
        "--cache-dir",
        cache,
        "--no-vanilla",
        *SET,
        "--steps",
        "8",
    )
    code, out, err = normfree("remove-norm", model, *arguments, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["beginning"]["token_ids"] == list(TEMPLATES[name][1])
    _, data = packed(tmp_path / "out" / "removal", cache)
    tokens = torch.from_numpy(np.asarray(data.eval.tokens, np.int64))
    labels = torch.where(torch.isin(tokens, torch.tensor(TEMPLATES[name][1])), -100, tokens)
    expected = mean_loss_behind(tiny_llama(0.02), tokens, labels)
    assert printed["table"][0]["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beginning", ["none", "tokenizer"])
def test_a_teacher_reads_sequences_that_begin_as_its_own(beginning, models, corpora, tmp_path):
    teacher = tmp_path / "teacher"
    from_hf(tiny_llama()).save_pretrained(teacher)
    tokenizer = saved(teacher, TEMPLATES["one"][0])
    config = DataConfig(
        corpus=corpora["text"], tokenizer=tokenizer, sequence_length=T, eval_fraction=0.3, beginning=beginning
    )
    run = RunConfig(
        model_name="tiny",
        configuration="student",
        model={"n_layer": 1, "n_head": 2, "n_embd": 16},
        data=config,
        recipe=Recipe(**QUICK),
        objective={"kind": "distillation", "teacher": str(teacher)},
    )
    data = prepare_data(config, tmp_path / "cache")
    if beginning == "none":
        with pytest.raises(InputError, match="the sequences here begin without it"):
            train(run, data, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    else:
        assert train(run, data, tmp_path / "run").row["status"] == "finished"
