"""What a model reads begins as its tokenizer begins a text."""

import json
from typing import Any

import pytest
import torch

from normfree.data import Beginning, load_tokenizer
from normfree.errors import InputError
from normfree.interpret import attention_sinks, induction_pairs, measure_depth, read_prompts, token_sequences
from normfree.training import load_pretrained, train
from tests.data.beginnings import TEMPLATES, saved, tiny_llama

T, N_SEQUENCE = 24, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random Llama with each of the tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    for name, (template, _) in TEMPLATES.items():
        tiny_llama().save_pretrained(folder / name)
        saved(folder / name, template)
    return folder


def read(models, name, corpus_folder, bos=None):
    return token_sequences(
        load_pretrained(str(models / name)),
        corpus=f"directory:{corpus_folder}",
        tokenizer=None,
        sequence_length=T,
        n_sequences=N_SEQUENCE,
        cache_dir=models / "cache",
        bos=bos,
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_sequences_of_a_foreign_model_begin_as_its_tokenizer_begins_a_text(name, models, corpus_folder):
    expected = TEMPLATES[name][1]
    plain = read(models, name, corpus_folder, bos=False)
    assert not torch.isin(plain.tokens, torch.tensor([300, 301, 302])).any()
    found = read(models, name, corpus_folder)
    n = len(expected)
    assert found.beginning.token_ids == expected
    assert found.tokens.shape == (N_SEQUENCE, T)
    assert (found.tokens[:, :n] == torch.tensor(expected, dtype=torch.int64)).all()
    assert not (found.tokens == 302).any()  # what a tokenizer adds behind a text is no beginning
    assert torch.equal(found.tokens[0, n:], plain.tokens[0, : T - n])
    forced = read(models, name, corpus_folder, bos=True)
    assert forced.beginning.token_ids == (expected or (300,))


def test_sinks_are_of_the_beginning_token(models, corpus_folder):
    model = load_pretrained(str(models / "one")).model.double()
    tokens = read(models, "one", corpus_folder).tokens
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = torch.stack([p[..., 0].mean((0, 2)) for p in model(tokens, output_attentions=True).attentions])
    model.set_attn_implementation("sdpa")
    found = attention_sinks(model, tokens)["sink_share"]
    torch.testing.assert_close(torch.tensor(found.to_numpy()), expected.flatten(), rtol=0, atol=1e-6)


def test_a_run_keeps_its_own_sequences(tiny_run, data, tmp_path, corpus_folder):
    train(tiny_run("SM+R"), data, tmp_path / "run")
    measured = load_pretrained(str(tmp_path / "run"))
    options: dict[str, Any] = {
        "tokenizer": None,
        "sequence_length": None,
        "n_sequences": 2,
        "cache_dir": data.folder.parent,
    }
    own = token_sequences(measured, corpus=None, **options)
    assert own.beginning == Beginning()
    assert torch.equal(own.tokens, torch.tensor(data.eval.tokens[:2].astype(int)))
    assert token_sequences(measured, corpus=f"directory:{corpus_folder}", **options).beginning == Beginning()
    with pytest.raises(InputError, match="own evaluation sequences begin as they do"):
        token_sequences(measured, corpus=None, bos=True, **options)


def test_prompts_begin_as_the_tokenizer_begins_a_text(models, tmp_path):
    tokenizer = load_tokenizer(str(models / "several"))
    beginning = Beginning.of(tokenizer, "tokenizer")
    path = tmp_path / "prompts.jsonl"
    row = {"clean": "value", "corrupted": "<mask><bos>value", "answer": "a", "wrong_answer": "b"}
    path.write_text(json.dumps(row))
    pairs = read_prompts(path, tokenizer, beginning)
    ids = tokenizer("value", add_special_tokens=False)["input_ids"]
    assert pairs.clean.tolist() == pairs.corrupted.tolist() == [[301, 300, *ids]]
    assert pairs.answers.tolist() == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_induction_never_asks_what_follows_a_beginning():
    sequences = torch.tensor([[300, 5, 5, 6, 6, 7, 8, 9, 10, 11]] * 3 + [[300, 12, 12, 13, 13, 14, 15, 16, 17, 18]])
    with pytest.raises(InputError, match="give 0 induction prompts"):
        induction_pairs(sequences, 1, n_beginning=1)
    assert (induction_pairs(sequences, 1).clean[:, -1] == 300).all()


def test_depth_predicts_no_beginning(models, corpus_folder):
    found = read(models, "several", corpus_folder)
    model = load_pretrained(str(models / "several")).model
    measured = measure_depth(model, found.tokens, n_probe=2, n_beginning=2)
    logits = model.double()(input_ids=found.tokens).logits[:, 1:-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), found.tokens[:, 2:])
    assert measured.summary["loss_nats"][0] == pytest.approx(losses.item(), abs=1e-5)
    losses.backward()
    gradient = torch.cat([each.grad.flatten() for each in model.model.layers[0].parameters()]).norm().item()
    assert measured.gradient_norms["parameter_gradient_norm"][0] == pytest.approx(gradient, rel=1e-4)
