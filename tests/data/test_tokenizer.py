import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from normfree.data import load_tokenizer, tokenizer, train_tokenizer
from normfree.errors import InputError

from .made_up import document

TEXTS = [document(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(iter(TEXTS), 300)


@given(text=st.text())
def test_any_text_round_trips(trained, text):
    ids = trained(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert trained.decode(ids) == text


def test_vocabulary(trained):
    assert len(trained) == trained.vocab_size == tokenizer.vocabulary_size(trained) == 300
    assert trained.bos_token == trained.eos_token == "<|endoftext|>"
    assert trained.bos_token_id == trained.eos_token_id == 0
    # 256 bytes, one special token, 43 merges.
    assert len(json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]) == 43


def test_first_merges_against_a_hand_computation():
    """ "ab" occurs six times, " ab" and "abc" less often: they are merged in the order of their counts."""
    trained = train_tokenizer(iter(["ab ab ab abc abc abd"]), 260)
    merges = json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]
    assert merges == [["a", "b"], ["Ġ", "ab"], ["Ġab", "c"]]


def test_training_is_deterministic(trained):
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_training_stops_reading_at_its_bound(monkeypatch):
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    first_two = sum(len(text.encode()) for text in TEXTS[:2])
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", first_two)
    capped = train_tokenizer(texts(), 280)
    assert read == TEXTS[:2]
    assert capped.get_vocab() == train_tokenizer(iter(TEXTS[:2]), 280).get_vocab()


def test_a_text_too_poor_for_the_vocabulary():
    with pytest.raises(InputError, match="supports a vocabulary of 258, vocab_size asks for 1000"):
        train_tokenizer(iter(["abab"]), 1000)


def test_no_bound_on_length_and_no_warning(trained, caplog, recwarn):
    trained("x " * 5000)
    assert not caplog.records
    assert not recwarn.list


def test_saved_tokenizers_load(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert loaded.eos_token_id == 0


@pytest.mark.parametrize("name", ["missing", "broken"])
def test_tokenizers_that_cannot_be_loaded(name, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot load tokenizer|no file or folder") as error:
        load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_remote_code_is_never_trusted(monkeypatch):
    seen = {}

    def from_pretrained(name, **options):
        seen.update(options)
        raise ValueError("needs remote code")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="needs remote code"):
        load_tokenizer("someone/tokenizer")
    assert seen == {"trust_remote_code": False}


def test_a_model_folder_without_tokenizer_files_is_no_tokenizer(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer files|cannot load tokenizer"):
        load_tokenizer(str(tmp_path))
