"""Beginning-of-text tokens: read off the tokenizer, in front of every sequence, never predicted."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfree.data import Beginning, DataConfig, load_tokenizer, prepare_data
from normfree.data.packed_sequences import Cutter, PackedSequences, write_sequences
from normfree.errors import InputError
from normfree.files import sha256

from .beginnings import TEMPLATES, saved, tokenizer_with
from .made_up import document, write_documents

T = 16


@pytest.mark.parametrize("name", TEMPLATES)
def test_beginning_is_what_the_tokenizer_puts_before_a_text(name, tmp_path):
    template, expected = TEMPLATES[name]
    tokenizer = load_tokenizer(saved(tmp_path, template))
    assert Beginning.of(tokenizer, "none").token_ids == ()
    beginning = Beginning.of(tokenizer, "tokenizer")
    assert beginning.token_ids == expected
    assert Beginning.of(tokenizer, "bos_token").token_ids == (expected or (300,))
    assert json.loads(json.dumps(beginning.summary()))["token_ids"] == list(expected)
    assert str(beginning) == (
        f"each begins with {' '.join(beginning.tokens)}" if expected else "no beginning-of-text token"
    )


def test_a_missing_token_and_an_encoding_that_hides_the_text_are_refused():
    with pytest.raises(InputError, match="has no beginning-of-text token"):
        Beginning.of(tokenizer_with(None, bos_token=None), "bos_token")
    assert Beginning.of(tokenizer_with("<bos> $A", bos_token=None), "bos_token").token_ids == (300,)

    class Rewrites:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0, 7, 8] if add_special_tokens else [1, 7]}

    with pytest.raises(InputError, match="--no-bos"):
        Beginning.of(Rewrites(), "tokenizer")  # type: ignore[arg-type]


def test_a_text_written_with_its_beginning_has_it_once():
    beginning = Beginning((301, 300), ("<mask>", "<bos>"), "tokenizer")
    assert beginning.before([5, 6]) == [301, 300, 5, 6]
    assert beginning.before([301, 300, 5]) == [301, 300, 5]
    assert Beginning().before([5]) == [5]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chunks_are_a_beginning_and_consecutive_tokens_of_one_document(name, tmp_path):
    template, beginning = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    texts = [document(seed) for seed in range(3)] + ["short"]
    statistics = write_sequences(
        tmp_path / "a.npy",
        texts,
        tokenizer,
        sequence_length=T,
        beginning=beginning,
        predicted_path=tmp_path / "p.npy",
    )
    n = T - len(beginning)
    expected, dropped = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [[*beginning, *ids[i : i + n]] for i in range(0, len(ids) - n + 1, n)]
        dropped += len(ids) % n
    sequences = PackedSequences(tmp_path / "a.npy", tmp_path / "p.npy")
    assert sequences.tokens.tolist() == expected
    assert (statistics.blocks, statistics.tokens) == (len(expected), len(expected) * T)
    assert statistics.dropped_tokens == dropped
    assert sequences.predicted is not None
    assert sequences.predicted.tolist() == [[False] * len(beginning) + [True] * n] * len(expected)
    capped = write_sequences(
        tmp_path / "b.npy", texts, tokenizer, sequence_length=T, beginning=beginning, max_tokens=3 * T + 1
    )
    assert PackedSequences(tmp_path / "b.npy").tokens.tolist() == expected[:3]
    assert capped.blocks == 3


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(0, 3),
    st.booleans(),
    st.integers(5, 13),
)
def test_joined_documents_begin_anew_and_nothing_is_lost(lengths, n, separated, size):
    beginning, separator = tuple(range(-n, 0)), 99 if separated else None
    cutter = Cutter(size, beginning)
    documents = [np.arange(1000 * (i + 1), 1000 * (i + 1) + n_tokens) for i, n_tokens in enumerate(lengths)]
    sequences, predicted = [], []
    for i, tokens in enumerate(documents):
        cut = cutter.cut(tokens, np.ones(len(tokens), np.bool_), separator if i else None)
        sequences += cut.tokens.tolist()
        predicted += cut.predicted.tolist()
    cutter.drop()
    whole = [token for tokens in documents for token in tokens.tolist()]
    read = [token for sequence in sequences for token in sequence if token >= 1000]
    assert read == whole[: len(read)]
    for sequence, mask in zip(sequences, predicted, strict=True):
        assert tuple(sequence[:n]) == beginning
        assert all(flag == (token >= 0) for token, flag in zip(sequence, mask, strict=True))
        starts = [i for i, token in enumerate(sequence) if token >= 1000 and token % 1000 == 0]
        assert all(tuple(sequence[start - n : start]) == beginning for start in starts)
    if n == 0:  # as without a beginning: one stream cut into sequences
        stream = [t for i, d in enumerate(documents) for t in ([separator] if i and separated else []) + d.tolist()]
        assert sequences == [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


@pytest.mark.parametrize("n_tokens", range(12))
def test_a_beginning_is_never_doubled_where_a_sequence_is_full(n_tokens):
    """The first document ends around the end of a sequence, with the separator its very last token at 5."""
    cutter = Cutter(8, (-2, -1))
    sequences = cutter.cut(np.arange(100, 100 + n_tokens), np.ones(n_tokens, np.bool_)).tokens.tolist()
    sequences += cutter.cut(np.arange(200, 220), np.ones(20, np.bool_), 99).tokens.tolist()
    for sequence in sequences:
        assert sequence[:2] == [-2, -1]
        assert sequence[2:4] != [-2, -1]
    assert [token for sequence in sequences for token in sequence if token >= 200] == list(range(200, 220))[
        : sum(token >= 200 for sequence in sequences for token in sequence)
    ]


def test_no_room_behind_the_beginning(tmp_path):
    with pytest.raises(InputError, match="no room behind the 2"):
        Cutter(3, (301, 300))


def config_for(folder, tokenizer, **options):
    return DataConfig(corpus=f"directory:{folder}", tokenizer=tokenizer, sequence_length=T, **options)


@pytest.mark.parametrize("cut", ["chunks", "packed"])
def test_packed_data_with_a_beginning_are_others_and_mask_it(folder, tmp_path, cut):
    tokenizer = saved(tmp_path / "tokenizer", "<bos> $A")
    plain = prepare_data(config_for(folder, tokenizer, cut=cut), tmp_path / "cache")
    data = prepare_data(config_for(folder, tokenizer, cut=cut, beginning="tokenizer"), tmp_path / "cache")
    assert data.fingerprint != plain.fingerprint
    assert (np.asarray(data.train.tokens)[:, 0] == 300).all()
    item = data.train[0]
    assert (item["labels"][item["input_ids"] == 300] == -100).all()
    assert (item["labels"] == -100).sum() == (item["input_ids"] == 300).sum()
    assert plain.train.predicted is None
    assert not (np.asarray(plain.train.tokens) == 300).any()
    same = prepare_data(config_for(folder, tokenizer, cut=cut, beginning="bos_token"), tmp_path / "cache")
    assert same.fingerprint == data.fingerprint


def test_a_tokenizer_that_adds_nothing_keeps_data_and_fingerprint(folder, tmp_path):
    tokenizer = saved(tmp_path / "tokenizer", "$A <eos>")
    plain = prepare_data(config_for(folder, tokenizer), tmp_path / "cache")
    assert prepare_data(config_for(folder, tokenizer, beginning="tokenizer"), tmp_path / "cache").folder == plain.folder


def test_configurations_without_a_beginning_are_written_as_before():
    assert "beginning" not in DataConfig().model_dump()
    assert "beginning" not in DataConfig(beginning="none").model_dump(mode="json")
    named = DataConfig(tokenizer="gpt2", beginning="tokenizer")
    assert DataConfig.model_validate(named.model_dump(mode="json")) == named
    with pytest.raises(ValueError, match="trained here puts nothing before a text"):
        DataConfig(beginning="bos_token")


def test_fingerprints_are_those_of_earlier_versions(tmp_path):
    """Written with the version before there was a beginning."""
    folder = write_documents(tmp_path / "corpus", {f"{seed}.txt": document(seed) for seed in range(30)})
    expected = {"chunks": ("78a840275fea357a", "7757da263b8bdf54"), "packed": ("d67697f9c9c73fb0", "e981b9e6eef66386")}
    for cut, (fingerprint, tokens) in expected.items():
        config = DataConfig(corpus=f"directory:{folder}", vocab_size=300, sequence_length=T, cut=cut, eval_fraction=0.2)
        data = prepare_data(config, tmp_path / "cache")
        assert data.fingerprint == fingerprint
        assert sha256(data.folder / "train.npy")[:16] == tokens


def test_pairs_begin_with_it_and_only_completions_are_predicted(tmp_path):
    tokenizer = saved(tmp_path / "tokenizer", "<mask> <bos> $A <eos>")
    rows = [{"prompt": f"question {i} ", "completion": f"answer {i * i}" * (1 + i % 5)} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        corpus=f"pairs:{path}",
        tokenizer=tokenizer,
        sequence_length=T,
        cut="packed",
        beginning="tokenizer",
        eval_fraction=0.3,
    )
    data = prepare_data(config, tmp_path / "cache")
    tokens, predicted = np.asarray(data.train.tokens), data.train.predicted
    assert predicted is not None
    assert (tokens[:, :2] == [301, 300]).all()
    assert not predicted[np.isin(tokens, (300, 301))].any()
    assert predicted[tokens == 302].all()
    text = data.tokenizer.decode([t for t, p in zip(tokens.ravel(), predicted.ravel(), strict=True) if p])
    assert "answer" in text
    assert "question" not in text
