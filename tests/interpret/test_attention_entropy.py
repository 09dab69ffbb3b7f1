"""Measuring a saved model: against NumPy on its own eager attentions; and bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from normfree.data import load_tokenizer
from normfree.entropy import uniform_entropy_bound
from normfree.errors import InputError
from normfree.interpret import measure_attention_entropy, token_sequences
from normfree.training import load_pretrained
from tests.measured_models import VOCABULARY, build, tokenizer_of

T, N_SEQUENCE, N_POSITIONS = 24, 6, 32
MODELS = ("gpt2", "llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with tiny random models, each with a tokenizer trained on made-up text."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_of()
    for name in MODELS:
        build(name, N_POSITIONS).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def sequences_of(measured, corpus, tmp_path, n_sequences=N_SEQUENCE, tokenizer=None, sequence_length=T):
    return token_sequences(
        measured,
        corpus=corpus,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        n_sequences=n_sequences,
        cache_dir=tmp_path / "cache",
    ).tokens


@torch.no_grad()
def eager_attentions(folder, tokens):
    """Float64 [n_layer, n, n_head, T, T]."""
    model = load_pretrained(str(folder)).model.double()
    model.set_attn_implementation("eager")
    return np.stack([each.numpy() for each in model(input_ids=tokens, output_attentions=True).attentions])


@pytest.mark.parametrize("name", MODELS)
def test_command_agrees_with_the_models_own_attention_weights(name, models, corpus_folder, normfree, tmp_path):
    corpus = f"directory:{corpus_folder}"
    arguments = ("--corpus", corpus, "--sequence-length", T, "--sequences", N_SEQUENCE, "--out", tmp_path / "out")
    code, out, err = normfree("entropy", models / name, *arguments, "--json")
    assert code == 0, err
    tokens = sequences_of(load_pretrained(str(models / name)), corpus, tmp_path)
    assert tokens.shape == (N_SEQUENCE, T)
    p = eager_attentions(models / name, tokens)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1).mean((1, 3))
    n_layer, n_head = entropy.shape

    heads = pd.read_csv(tmp_path / "out" / "heads.csv")
    assert heads["layer"].tolist() == np.repeat(np.arange(n_layer), n_head).tolist()
    assert heads["head"].tolist() == np.tile(np.arange(n_head), n_layer).tolist()
    bound = np.log(np.arange(1, T + 1)).mean()
    expected = {
        "entropy_nats": entropy,
        "uniform_nats": np.full_like(entropy, bound),
        "share_of_uniform": entropy / bound,
        "sink_share": p[..., 0].mean((1, 3)),
        "nan_queries": np.zeros_like(entropy),
    }
    for column, values in expected.items():
        np.testing.assert_allclose(heads[column], values.ravel(), rtol=0, atol=2e-5, err_msg=column)

    layers = pd.read_csv(tmp_path / "out" / "layers.csv")
    np.testing.assert_allclose(layers["mean_nats"], entropy.mean(1), atol=2e-5)
    np.testing.assert_allclose(layers["min_nats"], entropy.min(1), atol=2e-5)
    np.testing.assert_allclose(layers["max_nats"], entropy.max(1), atol=2e-5)
    assert layers["top_band_heads"].tolist() == (entropy >= 0.75 * entropy.max()).sum(1).tolist()
    assert layers["n_head"].tolist() == [n_head] * n_layer

    printed = json.loads(out)
    assert printed["uniform_bound_nats"] == pytest.approx(bound)
    assert printed["unreadable"] == {}
    np.testing.assert_allclose([row["entropy_nats"] for row in printed["heads"]], heads["entropy_nats"], atol=1e-8)
    for ending in ("png", "pdf"):
        assert (tmp_path / "out" / f"headwise-entropy.{ending}").stat().st_size > 1000


BOUNDS = {
    "bidirectional": [np.log(T)] * 2,
    "two kinds": [np.log(np.minimum(np.arange(1, T + 1), 4)).mean(), np.log(np.arange(1, T + 1)).mean()],
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_those_of_the_models_own_masks(name, models, corpus_folder, normfree, tmp_path):
    bounds = BOUNDS[name]
    build(name).save_pretrained(tmp_path / name)
    load_tokenizer(str(models / "llama")).save_pretrained(tmp_path / name)
    arguments = ("--corpus", f"directory:{corpus_folder}", "--sequence-length", T, "--sequences", 2)
    code, out, err = normfree("entropy", tmp_path / name, *arguments, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["uniform_bound_nats"] == pytest.approx(max(bounds))
    np.testing.assert_allclose([row["uniform_nats"] for row in printed["layers"]], bounds, rtol=1e-6)
    for row in printed["layers"]:
        assert row["mean_nats"] / row["uniform_nats"] == pytest.approx(row["share_of_uniform"])
        assert row["share_of_uniform"] < 1
    code, out, err = normfree("entropy", tmp_path / name, *arguments)
    assert code == 0, err
    for bound in bounds:
        assert f"{bound:.3f}" in out


def test_table_for_a_reader_and_default_folder(models, corpus_folder, normfree, tmp_path):
    code, out, err = normfree("entropy", models / "gpt2", "--corpus", f"directory:{corpus_folder}", "--sequences", 2)
    assert code == 0, err
    assert "2 sequences of 32 tokens" in out  # all positions the model has
    assert f"{uniform_entropy_bound(32):.3f}" in out
    assert "heads in top band" in " ".join(out.split())
    (folder,) = (tmp_path / "entropy").iterdir()
    assert re.fullmatch(r"models\d+--gpt2-[0-9a-f]{8}", folder.name)
    assert (folder / "heads.csv").exists()


def test_measures_a_run_on_its_own_evaluation_sequences(tiny_run, data, normfree, tmp_path):
    from normfree.training import train

    run = tiny_run("SM+R")
    result = train(run, data, tmp_path / "run")
    code, out, err = normfree("entropy", tmp_path / "run", "--sequences", len(data.eval), "--json")
    assert code == 0, err
    mine = [row["entropy_nats"] for row in json.loads(out)["heads"]]
    np.testing.assert_allclose(mine, result.head_entropy["entropy_nats"], rtol=0, atol=2e-6)
    checkpoint = load_pretrained(str(tmp_path / "run")).checkpoint
    assert load_pretrained(checkpoint).data == run.data


def test_layers_that_cannot_be_read_are_named(models):
    model = load_pretrained(str(models / "llama")).model
    layer = model.model.layers[1]

    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    layer.self_attn = OwnAttention()
    result = measure_attention_entropy(model, torch.randint(0, VOCABULARY, (2, T)))
    assert list(result.unreadable) == ["model.layers.1.self_attn"]
    assert sorted(set(result.heads["layer"])) == result.layers["layer"].tolist() == [0, 2]


def test_nan_is_counted_and_never_averaged_over(models):
    model = load_pretrained(str(models / "llama")).model
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8] = torch.nan  # head 0, and all of layer 2 through the residual
    result = measure_attention_entropy(model, torch.randint(0, VOCABULARY, (2, T)))
    heads = result.heads.set_index(["layer", "head"])
    assert heads["entropy_nats"].isna().tolist() == [False] * 4 + [True] + [False] * 3 + [True] * 4
    assert heads["nan_queries"].loc[[(1, 0), (2, 3)]].tolist() == [2 * T] * 2
    assert result.layers["mean_nats"].isna().tolist() == [False, True, True]
    assert result.summary()["layers"][1]["mean_nats"] is None


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("nowhere", (), "cannot load model"),
        (".", (), "holds no model"),
        ("gpt2", ("--sequence-length", "33"), "sequence length 33 is more than the 32 positions"),
        ("gpt2", ("--sequences", "100000"), "sequences of 32 tokens from within one document, 100000 are asked for"),
        ("gpt2", ("--sequence-length", "1"), "at least 2 tokens"),
        ("gpt2", ("--sequence-length", "0"), "at least 2 tokens"),
        ("gpt2", ("--corpus", "short.txt"), "corpus 'file:short.txt' has 0 sequences of 32 tokens from within one"),
        ("gpt2", ("--corpus", "empty.txt"), "corpus 'file:empty.txt' has no document"),
        ("gpt2", ("--sequences", "0"), "need at least 1 sequence"),
        ("gpt2", ("--tokenizer", "nowhere"), "cannot load tokenizer 'nowhere'"),
        ("gpt2", ("--corpus", "directory:nowhere"), "no folder 'nowhere'"),
        ("bare", (), "no tokenizer is saved with"),
        ("pickled", (), "cannot load model"),
        ("unfinished", (), "has no finished checkpoint"),
    ],
)
def test_bad_input_is_one_line(model, arguments, says, models, corpus_folder, normfree, tmp_path):
    build("gpt2", N_POSITIONS).save_pretrained(tmp_path / "bare")
    pickled = tmp_path / "pickled"
    build("gpt2", N_POSITIONS).save_pretrained(pickled)
    torch.save(build("gpt2", N_POSITIONS).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("{}")
    path = models / model if model in MODELS else Path(model)
    words = {"--corpus": f"directory:{corpus_folder}"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = normfree("entropy", path, *(word for pair in words.items() for word in pair))
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("normfree: ")
    assert says in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_needs_a_corpus_and_a_fitting_tokenizer(models, corpus_folder, tmp_path):
    measured = load_pretrained(str(models / "gpt2"))
    with pytest.raises(InputError, match="name a corpus"):
        sequences_of(measured, None, tmp_path)
    tokenizer_of(VOCABULARY + 20).save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match="give the tokenizer that the model was trained with"):
        sequences_of(measured, f"directory:{corpus_folder}", tmp_path, tokenizer=str(tmp_path / "larger"))
