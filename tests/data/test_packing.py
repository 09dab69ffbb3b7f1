import json
import logging
import shutil
from typing import Any, Literal

import numpy as np
import pytest

from normfree.data import DataConfig, load_packed_data, open_corpus, packing, prepare_data, same_data, train_tokenizer
from normfree.errors import InputError
from tests.recorded_stages import recorded_stages

from .made_up import document, write_documents


def config_for(folder, **fields):
    defaults: dict[str, Any] = {"vocab_size": 300, "sequence_length": 32, "eval_fraction": 0.3}
    if "tokenizer" in fields:
        del defaults["vocab_size"]
    return DataConfig(corpus=f"directory:{folder}", **(defaults | fields))


def written(data):
    return {path: path.stat().st_mtime_ns for path in data.folder.rglob("*") if path.is_file()}


def test_sequences_hold_the_documents_of_their_split(folder, tmp_path):
    """Decoding a split's sequences gives the beginnings of its documents, and of no other's."""
    config = config_for(folder)
    data = prepare_data(config, tmp_path / "cache")
    corpus = open_corpus(config)
    splits: tuple[tuple[Any, Literal["train", "eval"], Literal["train", "eval"]], ...] = (
        (data.train, "train", "eval"),
        (data.eval, "eval", "train"),
    )
    for sequences, split, other in splits:
        text = data.tokenizer.decode(sequences.tokens.reshape(-1).tolist())
        for each in corpus.documents(split):
            assert each[:200] in text
        for each in corpus.documents(other):
            assert each[:200] not in text


def test_statistics(folder, tmp_path):
    data = prepare_data(config_for(folder), tmp_path / "cache")
    statistics = data.statistics
    assert statistics["corpus"]["documents"] == 40
    assert statistics["vocab_size"] == len(data.tokenizer) == 300
    splits = [statistics["train"], statistics["eval"]]
    assert sum(each["documents"] for each in splits) == 40
    assert sum(each["bytes"] for each in splits) == statistics["corpus"]["bytes"]
    for sequences, each in zip((data.train, data.eval), splits, strict=True):
        assert each["tokens"] == sequences.tokens.size == 32 * each["blocks"]
        assert each["document_tokens"] == each["tokens"] + each["dropped_tokens"]
        assert each["bytes_per_token"] == each["bytes"] / each["document_tokens"]
    assert data.train.tokens.dtype == np.uint16


def test_the_tokenizer_never_sees_the_eval_split(folder, tmp_path):
    config = config_for(folder)
    data = prepare_data(config, tmp_path / "cache")
    expected = train_tokenizer(open_corpus(config).documents("train"), 300)
    assert data.tokenizer.get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("cut", ["chunks", "packed"])
def test_the_same_contents_elsewhere_give_the_same_bytes(folder, tmp_path, cut):
    moved = tmp_path / "else" / "where"
    shutil.copytree(folder / "a", moved / "b" / "c")
    first = prepare_data(config_for(folder, cut=cut), tmp_path / "cache1")
    second = prepare_data(config_for(moved, cut=cut), tmp_path / "cache2")
    assert first.fingerprint == second.fingerprint
    for name in ("train.npy", "eval.npy", "tokenizer/tokenizer.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_option(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="; give another place for tokens, with --cache-dir"):
        prepare_data(config_for(folder), tmp_path / "file" / "cache")


def test_caps(folder, tmp_path):
    everything = prepare_data(config_for(folder), tmp_path / "cache")
    capped = prepare_data(config_for(folder, train_tokens=1000, eval_tokens=320), tmp_path / "cache")
    assert capped.fingerprint != everything.fingerprint
    assert len(capped.train) == 1000 // 32
    assert len(capped.eval) == 10
    np.testing.assert_array_equal(capped.train.tokens, everything.train.tokens[:31])
    np.testing.assert_array_equal(capped.eval.tokens, everything.eval.tokens[:10])


def test_packed_sequences_are_joined_with_end_of_text(folder, tmp_path):
    config = config_for(folder, cut="packed")
    data = prepare_data(config, tmp_path / "cache")
    n_documents = data.statistics["train"]["documents"]
    n_joints = int((data.train.tokens == data.tokenizer.eos_token_id).sum())
    assert n_joints == n_documents - 1
    assert data.statistics["train"]["dropped_tokens"] < 32


def test_prepared_data_are_used_again(folder, tmp_path, monkeypatch):
    config = config_for(folder)
    first = prepare_data(config, tmp_path / "cache")
    before = written(first)
    monkeypatch.setattr(packing, "_build", None)
    second = prepare_data(config, tmp_path / "cache")
    assert written(second) == before
    assert second.fingerprint == first.fingerprint
    assert second.statistics == first.statistics
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "changed",
    [
        {"vocab_size": 310},
        {"sequence_length": 16},
        {"cut": "packed"},
        {"train_tokens": 320},
        {"eval_tokens": 320},
        {"eval_fraction": 0.4},
        {"max_document_bytes": 10**6},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_choice_is_in_the_fingerprint(folder, changed):
    def fingerprint(config):
        return packing._fingerprint(config, open_corpus(config), None)

    assert fingerprint(config_for(folder)) == fingerprint(config_for(folder))
    assert fingerprint(config_for(folder, **changed)) != fingerprint(config_for(folder))


def test_a_changed_document_is_another_fingerprint(folder, tmp_path):
    first = prepare_data(config_for(folder), tmp_path / "cache")
    write_documents(folder, {"a/0.py": document(0) + "# one line more\n"})
    second = prepare_data(config_for(folder), tmp_path / "cache")
    assert first.fingerprint != second.fingerprint
    assert first.folder.is_dir()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("train.npy", truncate, r"train.npy has \d+ bytes, \d+ were written"),
    ("eval.npy", flip_a_bit, "eval.npy is not as it was written"),
    ("tokenizer/tokenizer.json", lambda path: path.unlink(), "tokenizer/tokenizer.json is missing"),
    ("data.json", truncate, "data.json is not as it was written"),
    ("data.json", lambda path: path.unlink(), "data.json cannot be read"),
    ("data.json", lambda path: path.write_text("[]"), "data.json is not as it was written"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_data_are_reported_and_built_again(folder, tmp_path, caplog, name, damage, message):
    config = config_for(folder, train_tokens=640, eval_tokens=320)
    first = prepare_data(config, tmp_path / "cache")
    whole = {path: path.read_bytes() for path in written(first)}
    del first
    damage(next(path for path in whole if path.as_posix().endswith(name)))
    with pytest.raises(InputError, match=message):
        load_packed_data(next(path for path in whole if path.name == "data.json").parent)
    with caplog.at_level(logging.WARNING):
        again = prepare_data(config, tmp_path / "cache")
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().endswith("building it again")
    assert {path: path.read_bytes() for path in written(again)} == whole


def test_load_packed_data_needs_no_corpus(folder, tmp_path):
    data = prepare_data(config_for(folder), tmp_path / "cache")
    shutil.rmtree(folder)
    loaded = load_packed_data(data.folder)
    assert loaded.fingerprint == data.fingerprint == data.folder.name
    np.testing.assert_array_equal(loaded.train.tokens, data.train.tokens)
    with pytest.raises(InputError, match="cannot be used"):
        load_packed_data(tmp_path / "missing")


def test_the_record_reads_back_as_the_config(folder, tmp_path):
    config = config_for(folder)
    data = prepare_data(config, tmp_path / "cache")
    record = json.loads((data.folder / "data.json").read_text(encoding="utf-8"))
    assert DataConfig.model_validate(record["config"]) == config
    assert record["files"].keys() == {
        path.relative_to(data.folder).as_posix() for path in written(data) if path.name != "data.json"
    }


@pytest.mark.parametrize("stage", ["train_tokenizer", "write_sequences"])
def test_a_build_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, stage):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, stage, fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(config_for(folder), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_slower_of_two_builders_uses_the_others(folder, tmp_path, monkeypatch):
    config = config_for(folder)
    build = packing._build
    faster: list[Any] = []

    def build_after_another_process(*args):
        build(*args)
        if not faster:
            faster.append(None)
            faster[0] = prepare_data(config, tmp_path / "cache")
            faster.append(written(faster[0]))

    monkeypatch.setattr(packing, "_build", build_after_another_process)
    slower = prepare_data(config, tmp_path / "cache")
    assert written(slower) == faster[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [slower.fingerprint]


def test_another_tokenizer(folder, tmp_path):
    tokenizer = train_tokenizer(iter([document(seed) for seed in range(100, 120)]), 280)
    tokenizer.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "two")
    first = prepare_data(config_for(folder, tokenizer=str(tmp_path / "one")), tmp_path / "cache")
    second = prepare_data(config_for(folder, tokenizer=str(tmp_path / "two")), tmp_path / "cache")
    assert first.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != prepare_data(config_for(folder), tmp_path / "cache").fingerprint


def test_packing_needs_an_end_of_text_token(folder, tmp_path):
    tokenizer = train_tokenizer(iter([document(0)]), 280)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    fields: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(InputError, match="no end-of-text token"):
        prepare_data(config_for(folder, cut="packed", **fields), tmp_path / "cache")
    assert len(prepare_data(config_for(folder, **fields), tmp_path / "cache").train)


@pytest.mark.parametrize(("cut", "needed"), [("chunks", "at least 4096 in one document"), ("packed", "at least")])
def test_a_corpus_too_small_for_a_sequence(folder, tmp_path, cut, needed):
    n_words = {"chunks": 40, "packed": 1}[cut]
    small = write_documents(tmp_path / "small", {f"{i}.py": document(i, n_words) for i in range(20)})
    config = config_for(small, cut=cut, sequence_length=4096, vocab_size=280)
    with pytest.raises(InputError, match=rf"train split has \d+ tokens in \d+ documents, one sequence needs {needed}"):
        prepare_data(config, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_corpus_with_an_eval_split_too_small(folder, tmp_path):
    config = config_for(folder, eval_fraction=0.001)
    with pytest.raises(InputError, match="none of its 40 documents falls into the eval split"):
        prepare_data(config, tmp_path / "cache")


def test_a_file_that_changes_while_the_tokenizer_trains(folder, tmp_path, monkeypatch):
    corpus = open_corpus(config_for(folder))
    write_documents(folder, {f"a/{seed}.py": "changed" for seed in range(40)})
    monkeypatch.setattr(packing, "open_corpus", {config_for(folder): corpus}.get)
    with pytest.raises(InputError, match="changed while the corpus was being read"):
        prepare_data(config_for(folder), tmp_path / "cache")


def test_the_tokens_of_an_earlier_run_are_found_though_the_corpus_changed(folder, tmp_path):
    config = config_for(folder)
    earlier = prepare_data(config, tmp_path / "cache")
    write_documents(folder, {"later.py": document(1000)})
    again = same_data(config, tmp_path / "cache", earlier.fingerprint)
    assert (again.folder, again.fingerprint) == (earlier.folder, earlier.fingerprint)
    with pytest.raises(InputError, match=f"{earlier.fingerprint} are not in .* has changed since"):
        same_data(config, tmp_path / "other", earlier.fingerprint)
    (folder / "later.py").unlink()
    rebuilt = same_data(config, tmp_path / "third", earlier.fingerprint)
    assert (rebuilt.eval.tokens == earlier.eval.tokens).all()


def test_stages_are_named_and_nothing_is_printed_by_default(folder, tmp_path, capfd):
    with recorded_stages() as stages:
        prepare_data(config_for(folder), tmp_path / "cache")
    names = ["training the tokenizer", "packing the train split", "packing the eval split"]
    assert stages == [f"preparing {config_for(folder).corpus}", *names]
    prepare_data(config_for(folder, seed=1), tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
