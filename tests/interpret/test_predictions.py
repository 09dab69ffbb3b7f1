"""Comparisons of models by their names."""

import pytest
import torch

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
