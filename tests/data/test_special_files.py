"""Names that lead to no regular file, and texts that no tokenizer reads: told at once, never waited for."""

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from normfree.data import DataConfig, open_corpus, prepare_data
from normfree.errors import InputError
from normfree.files import read_regular
from normfree.interpret import read_prompts
from normfree.training import load_run_config

from .made_up import document, write_documents

NO_TOKENIZER: Any = None
"""What is refused is refused before the tokenizer is needed."""

KINDS = ("pipe", "zero", "socket", "folder", "loop", "broken")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with one of each kind of file that is no file, under every suffix."""
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("pipe")
    Path("zero").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("broken").symlink_to("nowhere")
    yield tmp_path
    server.close()


def within(seconds, action):
    """What ``action`` raises, in a thread that may hang."""
    raised = []

    def run():
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return raised[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(kind, place):
    error = within(10, lambda: read_regular(place / kind))
    assert isinstance(error, OSError)
    assert error.strerror


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json.gz", ".csv", ".parquet", ""])
def test_corpora_of_one_file(kind, suffix, place):
    path = place / f"x{suffix}"
    path.symlink_to(kind)
    error = within(10, lambda: open_corpus(DataConfig(corpus=f"file:{path}")))
    assert isinstance(error, InputError)
    pairs = DataConfig(corpus=f"pairs:{path}", cut="packed")
    assert isinstance(within(10, lambda: open_corpus(pairs)), InputError)


def test_a_folder_counts_them_as_unreadable(place):
    write_documents(place / "corpus", {f"{seed}.py": document(seed) for seed in range(4)})
    for kind in KINDS:
        (place / "corpus" / kind).symlink_to(place / kind)
    statistics = open_corpus(DataConfig(corpus=f"directory:{place / 'corpus'}")).statistics
    assert statistics.documents == 4
    # A link to a folder is not followed; the others are no files to read.
    assert statistics.unreadable == len(KINDS) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_and_prompts(kind, place):
    assert isinstance(within(10, lambda: load_run_config(place / kind)), InputError)
    assert isinstance(within(10, lambda: read_prompts(place / kind, NO_TOKENIZER)), InputError)


def test_names_that_cannot_be(tmp_path):
    for name in ("x\0y", "x" * 5000, "~nobody-of-this-name/x"):
        for spec in ("file", "directory", "pairs"):
            with pytest.raises(InputError, match="no f"):
                open_corpus(DataConfig(corpus=f"{spec}:{name}", cut="packed"))
    with pytest.raises(OSError, match="NUL"):
        read_regular(tmp_path / "x\0y")


def test_a_file_that_grows_is_refused(tmp_path):
    with pytest.raises(OSError, match="grows"):
        read_regular(Path("/proc/self/status"))  # its size is 0


BAD = {"a lone surrogate": "\ud800", "half of a pair": "a\udc00b", "a NUL": "a\0b"}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_pairs_are_admitted_by_their_text(name, field, tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}" * 9} for i in range(40)]
    rows[3] = rows[3] | {field: BAD[name]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(corpus=f"pairs:{path}", cut="packed", vocab_size=270, sequence_length=16, eval_fraction=0.3)
    data = prepare_data(config, tmp_path / "cache")
    corpus = data.statistics["corpus"]
    assert corpus["documents"] == 39
    assert corpus["binary"] + corpus["undecodable"] == 1


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_records_are_admitted_by_their_text(name, suffix, tmp_path):
    rows = [{"text": document(i)} for i in range(5)] + [{"text": BAD[name]}]
    path = tmp_path / f"a{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    statistics = open_corpus(DataConfig(corpus=f"file:{path}")).statistics
    assert statistics.documents == 5
    assert statistics.binary + statistics.undecodable == 1


@pytest.mark.parametrize("name", BAD)
def test_prompts_that_no_tokenizer_reads(name, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"clean": BAD[name], "corrupted": "b", "answer": "c", "wrong_answer": "d"}))
    with pytest.raises(InputError, match="line 1: clean has a NUL or half of a surrogate pair"):
        read_prompts(path, NO_TOKENIZER)
