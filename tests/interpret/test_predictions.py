"""Comparisons of models by their names."""

import json
import re
import shutil

import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.interpret import compare_predictions, token_sequences
from normfree.training import load_pretrained, train
from normfree.training.predictions import predictions


def test_runs_are_compared_on_named_corpora(plain_run, tiny_run, data, corpus_folder, tmp_path):
    folder = str(plain_run.folder)
    train(tiny_run("other", seed=4), data, tmp_path / "other")
    corpora = [f"directory:{corpus_folder}", f"directory:{corpus_folder}:1*.py"]
    found = compare_predictions({"one": folder, "two": str(tmp_path / "other")}, corpora, n_sequences=9)
    rows = found.evaluation.set_index(["corpus", "model"])
    assert rows.index.tolist() == [(corpus, model) for corpus in corpora for model in ("one", "two")]
    first, second = load_pretrained(folder), load_pretrained(str(tmp_path / "other"))
    sequences = token_sequences(first, corpus=corpora[1], n_sequences=9).tokens
    expected = predictions([first.model, second.model], sequences)[1].summary()
    assert rows.loc[(corpora[1], "two"), list(expected)].to_dict() == pytest.approx(expected, rel=1e-6)
    own = compare_predictions([folder], n_sequences=4)
    assert own.evaluation["corpus"].tolist() == [f"evaluation data of {folder}"]
    with torch.no_grad():
        labels = data.eval.whole(4)[0]
        loss = first.model(input_ids=labels, labels=labels).loss.item()
    assert own.evaluation["loss_nats"][0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("corpora", [[], ["installed-python", "installed-python"]])
def test_corpora_are_named_once(plain_run, corpora):
    with pytest.raises(InputError, match="name at least one, and each once"):
        compare_predictions([str(plain_run.folder)], corpora)


def test_a_later_model_with_fewer_positions_is_refused(plain_run, tmp_path):
    """Rotary positions have no table to run out of: such a model would answer, and mean nothing."""
    short = tmp_path / "short"
    shutil.copytree(load_pretrained(str(plain_run.folder)).checkpoint, short)
    config = json.loads((short / "config.json").read_text())
    config |= {"position": "rotary", "n_positions": config["n_positions"] // 2}
    model = NormfreeForCausalLM(NormfreeConfig.from_dict(config))
    model.save_pretrained(short)
    message = f"{short} has {config['n_positions']} positions, and the sequences {2 * config['n_positions']} tokens"
    models = [str(plain_run.folder), str(short)]
    with pytest.raises(InputError, match=re.escape(message)):
        compare_predictions(models, n_sequences=2)
