from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from normfree.data import DataConfig, hub, open_corpus, prepare_data
from normfree.errors import InputError

from .made_up import document

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def stream(texts, column="content"):
    return datasets.Dataset.from_list([{column: text} for text in texts]).to_iterable_dataset()


def stand_at(monkeypatch, commit):
    def dataset_info(self, name, revision=None):
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


@pytest.fixture
def fake_hub(monkeypatch):
    """Data sets by name (a dictionary of splits); calls of load_dataset are kept in ``.calls``."""
    fake = SimpleNamespace(splits={}, calls=[])

    def load_dataset(path, name=None, *, split=None, revision=None, streaming=False):
        fake.calls.append((path, name, split, revision, streaming))
        if path not in fake.splits:
            raise datasets.exceptions.DatasetNotFoundError(f"{path} is not there\nmore lines")
        return datasets.IterableDatasetDict(fake.splits[path]) if split is None else fake.splits[path][split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stand_at(monkeypatch, COMMIT)
    return fake


@pytest.fixture
def codeparrot(fake_hub):
    train = [document(seed) for seed in range(60)]
    validation = [document(seed) for seed in range(50, 70)]
    fake_hub.splits["huggingface-course/codeparrot-ds-train"] = {"train": stream(train)}
    fake_hub.splits["huggingface-course/codeparrot-ds-valid"] = {"validation": stream(validation)}
    return fake_hub


def test_codeparrot_reads_its_two_data_sets(codeparrot):
    corpus = open_corpus(DataConfig(corpus="codeparrot"))
    train, held_out = list(corpus.documents("train")), list(corpus.documents("eval"))
    assert codeparrot.calls == [
        ("huggingface-course/codeparrot-ds-train", None, "train", COMMIT, True),
        ("huggingface-course/codeparrot-ds-valid", None, "validation", COMMIT, True),
    ]
    assert set(held_out) == {document(seed) for seed in range(50, 70)}
    # Ten files stand in both: they stay in the eval split.
    assert set(train) == {document(seed) for seed in range(50)}
    assert corpus.statistics.documents == 70
    assert corpus.statistics.duplicates == 10


def test_codeparrot_train_is_shuffled_with_the_seed(codeparrot):
    in_order = [document(seed) for seed in range(60)]
    expected = [row["content"] for row in stream(in_order).shuffle(seed=0, buffer_size=10_000)]
    corpus = open_corpus(DataConfig(corpus="codeparrot"))
    train = list(corpus.documents("train"))
    held_out = {document(seed) for seed in range(50, 70)}
    assert train == [text for text in expected if text not in held_out]
    assert train != [text for text in in_order if text not in held_out]
    assert list(corpus.documents("train")) == train
    assert list(open_corpus(DataConfig(corpus="codeparrot", seed=1)).documents("train")) != train


def test_codeparrot_validation_is_capped(codeparrot, monkeypatch):
    monkeypatch.setattr(hub, "CODEPARROT_VALIDATION_DOCUMENTS", 5)
    assert len(list(open_corpus(DataConfig(corpus="codeparrot")).documents("eval"))) == 5


def test_codeparrot_is_packed_and_reused(codeparrot, tmp_path):
    config = DataConfig(corpus="codeparrot", vocab_size=300, sequence_length=32, train_tokens=3200)
    data = prepare_data(config, tmp_path)
    assert len(data.train) == 100
    assert data.statistics["eval"]["documents"] == 20
    written = (data.folder / "data.json").stat().st_mtime_ns
    again = prepare_data(config, tmp_path)
    assert again.fingerprint == data.fingerprint
    assert (again.folder / "data.json").stat().st_mtime_ns == written


def test_a_new_commit_on_the_hub_is_another_fingerprint(codeparrot, monkeypatch):
    before = open_corpus(DataConfig(corpus="codeparrot")).fingerprint
    stand_at(monkeypatch, "f" * 40)
    assert open_corpus(DataConfig(corpus="codeparrot")).fingerprint != before


@pytest.mark.parametrize("column", ["text", "content"])
def test_hub_without_validation_is_split_by_hash(fake_hub, column):
    texts = [document(seed) for seed in range(40)]
    fake_hub.splits["someone/code"] = {"train": stream([*texts, *texts[:4], "", "a\0b"], column)}
    corpus = open_corpus(DataConfig(corpus="hf:someone/code", eval_fraction=0.4))
    train, held_out = list(corpus.documents("train")), list(corpus.documents("eval"))
    assert set(train) | set(held_out) == set(texts)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 40
    assert held_out
    statistics = corpus.statistics
    assert (statistics.documents, statistics.duplicates, statistics.empty, statistics.binary) == (40, 4, 1, 1)


def test_hub_validation_split_is_used(fake_hub):
    fake_hub.splits["a/b"] = {
        "train": stream(["x", "y", "z"], "text"),
        "validation": stream(["v", "z"], "text"),
    }
    corpus = open_corpus(DataConfig(corpus="hf:a/b"))
    assert list(corpus.documents("eval")) == ["v", "z"]
    assert set(corpus.documents("train")) == {"x", "y"}


def test_revision_and_configuration_are_passed_on(fake_hub):
    fake_hub.splits["a/b"] = {"train": stream(["x"])}
    commit = "a" * 40
    open_corpus(DataConfig(corpus=f"hf:a/b@{commit}:plain"))
    assert fake_hub.calls == [("a/b", "plain", None, commit, True)]
    open_corpus(DataConfig(corpus="hf:a/b@main"))
    assert fake_hub.calls[-1] == ("a/b", None, None, COMMIT, True)


def test_c4_is_its_english_configuration_with_its_own_validation_split(fake_hub, tmp_path):
    """The corpus of the LLaMA presets: rows of text, timestamp and url, streamed."""
    train, validation = ([f"page {seed}: {document(seed)}" for seed in seeds] for seeds in (range(60), range(55, 65)))
    fake_hub.splits["allenai/c4"] = {
        split: datasets.Dataset.from_list(
            [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"} for text in texts]
        ).to_iterable_dataset()
        for split, texts in (("train", train), ("validation", validation))
    }
    config = DataConfig(
        corpus="hf:allenai/c4:en",
        vocab_size=300,
        sequence_length=32,
        cut="packed",
        train_tokens=3200,
        eval_tokens=640,
    )
    corpus = open_corpus(config)
    assert fake_hub.calls == [("allenai/c4", "en", None, COMMIT, True)]
    assert corpus.fingerprint == f"hub:allenai/c4@{COMMIT}:en"
    assert list(corpus.documents("eval")) == validation
    assert set(corpus.documents("train")) == set(train[:55])
    data = prepare_data(config, tmp_path)
    assert (len(data.train), len(data.eval)) == (100, 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "names no data set"),
        ("hf:a/missing", "cannot open 'a/missing' .*is not there.; check"),
        ("hf:a/test_only", "no train split; its splits: test"),
        ("codeparrot:small", "takes no argument"),
    ],
)
def test_bad_hub_specs(fake_hub, spec, message):
    fake_hub.splits["a/test_only"] = {"test": stream(["x"])}
    with pytest.raises(InputError, match=message):
        open_corpus(DataConfig(corpus=spec))


def test_rows_without_text(fake_hub):
    fake_hub.splits["a/b"] = {"train": stream(["x"], "body")}
    with pytest.raises(InputError, match=r"no text under 'text' or 'content' \(found body"):
        list(open_corpus(DataConfig(corpus="hf:a/b")).documents("train"))


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    def unreachable(self, name, revision=None):
        raise ConnectionError("name or service not known\ntraceback")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError, match="cannot open 'huggingface-course/codeparrot-ds-train'") as error:
        open_corpus(DataConfig(corpus="codeparrot"))
    assert "\n" not in str(error.value)
