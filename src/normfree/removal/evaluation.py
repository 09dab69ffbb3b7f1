"""A removal's models compared with the original, as the paper compares them, on several corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from normfree.data import Beginning, PackedData, corpus_sequences
from normfree.data.corpus_name import full_corpus_name
from normfree.errors import InputError
from normfree.removal.layout import NORM_FREE, NORM_FREE_FOLDER, ORIGINAL, VANILLA
from normfree.removal.model_card import write_cards
from normfree.training import RunConfig, load_pretrained
from normfree.training.prediction_comparison import Loader, PredictionComparison, Text, compare_on
from normfree.training.pretrained import starting_model

SEQUENCES = 128
"""Of each corpus, at most; T tokens each."""


def evaluation_texts(run: RunConfig, data: PackedData, corpora: Sequence[str], n_sequences: int) -> dict[str, Text]:
    """The first sequences of the evaluation data of ``run``, and of each other corpus, cut as those; by corpus.

    Raises:
        InputError: a corpus cannot be used, has no sequence, or is given twice; the run's own corpus counts as given.
    """
    tokens, labels = data.eval.whole(n_sequences)
    texts = {run.data.corpus: Text(tokens, labels)}
    beginning = Beginning.of(data.tokenizer, run.data.beginning)
    for corpus in map(full_corpus_name, corpora):
        if corpus in texts:
            raise InputError(
                f"{corpus} is evaluated twice; the evaluation data of the fine-tuning corpus are always measured, and "
                "each other corpus is named once"
            )
        T = run.data.sequence_length
        found = corpus_sequences(corpus, data.tokenizer, T, n_sequences, beginning)
        if not len(found):
            raise InputError(f"corpus {corpus!r} has no sequence of {T} tokens within one document; name another")
        texts[corpus] = Text.of(found, len(beginning))
    return texts


def evaluate_removal(
    run: RunConfig, data: PackedData, folder: Path, texts: Mapping[str, Text], *, vanilla: bool
) -> PredictionComparison:
    """Compares the models of a finished removal in ``folder`` on ``texts``, in float32, and writes the comparison.

    The exports' model cards get it as well. Corpora that are in ``folder`` already, with as many sequences and the same
    models, are not measured again.
    """
    assert run.start_from is not None, "there is a model to start from"
    start = run.start_from
    models: dict[str, Loader] = {ORIGINAL: lambda: starting_model(start, data)}
    if vanilla:
        models[VANILLA] = lambda: load_pretrained(str(folder / VANILLA), dtype="fp32").as_normfree()
    models[NORM_FREE] = lambda: load_pretrained(str(folder / NORM_FREE_FOLDER), dtype="fp32").model
    measured = PredictionComparison.read(folder)
    wanted = [(corpus, model, len(text.tokens)) for corpus, text in texts.items() for model in models]
    missing = dict(texts)
    if measured is not None:
        rows = set(measured.evaluation[["corpus", "model", "sequences"]].itertuples(index=False, name=None))
        missing = {corpus: texts[corpus] for corpus, model, n in wanted if (corpus, model, n) not in rows}
        measured = measured.without(missing)
    if not missing and measured is not None:
        return measured
    found = compare_on(missing, models)
    found = found if measured is None else measured.together(found)
    found.write(folder)
    write_cards(folder)
    return found
