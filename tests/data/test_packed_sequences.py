import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from normfree.data import PackedSequences, packed_sequences, train_tokenizer
from normfree.data.packed_sequences import write_sequences

from .made_up import document

T = 16
TEXTS = [document(seed, n_words) for seed, n_words in enumerate([60, 3, 40, 0, 25, 90])]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((document(seed) for seed in range(20)), 300)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """Tokens of each text, by the tokenizer's own backend."""
    return [tokenizer.backend_tokenizer.encode(text).ids for text in TEXTS]


def test_chunks_are_those_of_the_hugging_face_course(tokenizer, tmp_path):
    """The course (and ReLU's Revival): overflowing chunks of at most T tokens, kept where exactly T long."""
    reference = tokenizer(TEXTS, truncation=True, max_length=T, return_overflowing_tokens=True, return_length=True)
    kept = [ids for ids, n in zip(reference["input_ids"], reference["length"], strict=True) if n == T]
    statistics = write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), kept)
    assert statistics.blocks == len(kept)
    assert statistics.dropped_tokens == sum(n for n in reference["length"] if n < T)


def test_chunks_by_hand(tokenizer, tokens, tmp_path):
    statistics = write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T)
    expected = [ids[i : i + T] for ids in tokens for i in range(0, len(ids) - T + 1, T)]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    total = sum(map(len, tokens))
    assert statistics.documents == len(TEXTS)
    assert statistics.bytes == sum(len(text.encode()) for text in TEXTS)
    assert statistics.document_tokens == total
    assert statistics.tokens == T * len(expected)
    assert statistics.dropped_tokens == total - T * len(expected)
    assert statistics.bytes_per_token == statistics.bytes / total


@pytest.mark.parametrize("batch_bytes", [1, 200, 2**20])
def test_packed_by_hand(tokenizer, tokens, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(packed_sequences, "BATCH_BYTES", batch_bytes)
    statistics = write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T, separator=0)
    joined = list(tokens[0])
    for ids in tokens[1:]:
        joined += [0, *ids]
    n_sequences = len(joined) // T
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.reshape(joined[: n_sequences * T], (n_sequences, T)))
    assert statistics.tokens == n_sequences * T
    assert statistics.dropped_tokens == len(joined) - n_sequences * T
    assert statistics.document_tokens == sum(map(len, tokens))


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("cap", [T, T + 1, 5 * T, 5 * T - 1, 10**6])
def test_a_cap_keeps_the_first_blocks(tokenizer, tmp_path, separator, cap):
    options: dict[str, Any] = {"sequence_length": T, "separator": separator}
    write_sequences(tmp_path / "all.npy", TEXTS, tokenizer, **options)
    statistics = write_sequences(tmp_path / "capped.npy", TEXTS, tokenizer, max_tokens=cap, **options)
    everything = np.load(tmp_path / "all.npy")
    capped = np.load(tmp_path / "capped.npy")
    np.testing.assert_array_equal(capped, everything[: cap // T])
    assert statistics.tokens == capped.size <= cap


def test_a_cap_stops_reading(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_sequences, "BATCH_BYTES", 1)
    read = []

    def documents():
        for text in TEXTS:
            read.append(text)
            yield text

    statistics = write_sequences(tmp_path / "a.npy", documents(), tokenizer, sequence_length=T, max_tokens=T)
    assert read == TEXTS[:1]
    assert statistics.documents == 1


def test_text_that_looks_like_a_special_token_stays_text(tokenizer, tmp_path):
    write_sequences(tmp_path / "a.npy", ["<|endoftext|>" * 20], tokenizer, sequence_length=T)
    assert not (np.load(tmp_path / "a.npy") == tokenizer.eos_token_id).any()


def test_the_progress_report_counts_tokens(tokenizer, tmp_path):
    reported: list[int] = []
    statistics = write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T, report=reported.append)
    assert len(reported) == len(TEXTS)
    assert reported == sorted(reported)
    assert reported[-1] == statistics.tokens


def test_long_documents_do_not_warn(tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T)
    assert not caplog.records


@pytest.mark.parametrize(("n_added", "dtype"), [(2**16 - 300, np.uint16), (2**16 - 299, np.uint32)])
def test_the_smallest_type_that_holds_every_id(tmp_path, n_added, dtype):
    tokenizer = train_tokenizer((document(seed) for seed in range(20)), 300)
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {f"added{i}": 300 + i for i in range(n_added)}
    tokenizer.get_vocab = lambda: vocabulary  # type: ignore[method-assign]
    write_sequences(tmp_path / "a.npy", TEXTS, tokenizer, sequence_length=T)
    assert np.load(tmp_path / "a.npy").dtype == dtype


def test_no_documents_make_an_empty_file(tokenizer, tmp_path):
    statistics = write_sequences(tmp_path / "a.npy", [], tokenizer, sequence_length=T)
    assert np.load(tmp_path / "a.npy").shape == (0, T)
    assert np.isnan(statistics.bytes_per_token)


@pytest.fixture
def token_sequences(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10 * T, dtype=np.uint16).reshape(10, T) * 400)
    return PackedSequences(tmp_path / "a.npy")


def test_items(token_sequences):
    assert len(token_sequences) == 10
    assert token_sequences.sequence_length == T
    item = token_sequences[3]
    expected = torch.arange(3 * T, 4 * T) * 400
    assert item.keys() == {"input_ids", "labels"}
    for value in item.values():
        assert value.dtype == torch.int64
        assert torch.equal(value, expected)
    assert torch.equal(token_sequences[-1]["input_ids"], token_sequences[9]["input_ids"])
    with pytest.raises(IndexError):
        token_sequences[10]


def test_labels_are_not_the_same_memory(token_sequences):
    for item in (token_sequences[0], token_sequences.__getitems__([0, 1])[0]):
        item["labels"][:] = -100
        assert (item["input_ids"] >= 0).all()
    assert (token_sequences.tokens[0] == np.arange(T) * 400).all()


def test_batches_are_the_items(token_sequences):
    indices = [7, 0, 7, 2]
    for batched, index in zip(token_sequences.__getitems__(indices), indices, strict=True):
        for name, value in token_sequences[index].items():
            assert torch.equal(batched[name], value)
            assert batched[name].dtype == torch.int64


@pytest.mark.parametrize("collate_fn", [None, default_data_collator])
def test_a_data_loader_gives_every_sequence_once(token_sequences, collate_fn):
    batches = list(DataLoader(token_sequences, batch_size=4, shuffle=True, collate_fn=collate_fn))
    assert [tuple(batch["labels"].shape) for batch in batches] == [(4, T), (4, T), (2, T)]
    seen = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(seen[seen[:, 0].argsort()], torch.arange(10 * T).reshape(10, T) * 400)


def test_a_worker_gets_the_path_not_the_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1000, T), dtype=np.uint16))
    sent = pickle.dumps(PackedSequences(tmp_path / "a.npy"))
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert isinstance(received.tokens, np.memmap)
    assert len(received) == 1000
