import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normfree.data import DataConfig, local, open_corpus
from normfree.data.documents import CorpusStatistics
from normfree.errors import InputError

from .made_up import document, write_documents


def config_for(spec: str, **fields) -> DataConfig:
    return DataConfig(corpus=spec, **fields)


def test_documents_are_counted_by_reason(tmp_path):
    text = document(0)
    folder = write_documents(
        tmp_path / "corpus",
        {
            "kept.py": text,
            "again/kept.py": text,
            "other.txt": "Grüße\n",
            "latin.py": "Grüße".encode("latin-1"),
            "image.bin": b"GIF89a\0\0",
            "empty/__init__.py": b"",
            "blank.py": b" \n\t\n",
            "large.py": b"x" * 5001,
            "largest_allowed.py": b"y" * 5000,
            ".hidden/secret.py": "hidden",
            "shown/.hidden.py": "hidden",
        },
    )
    (folder / "broken.py").symlink_to(folder / "nowhere.py")
    corpus = open_corpus(config_for(f"directory:{folder}", max_document_bytes=5000))
    assert corpus.statistics == CorpusStatistics(
        documents=3,
        bytes=len(text.encode()) + len("Grüße\n".encode()) + 5000,
        duplicates=1,
        undecodable=1,
        binary=1,
        too_large=1,
        empty=2,
        unreadable=1,
    )


def test_unreadable_folders_are_counted(folder, monkeypatch):
    scandir = os.scandir

    def refusing_scandir(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    write_documents(folder, {"top.py": document(99)})
    monkeypatch.setattr(os, "scandir", refusing_scandir)
    assert open_corpus(config_for(f"directory:{folder}")).statistics.unreadable == 1


def test_order_and_split_follow_the_documented_hash(folder):
    """Against an independent computation: sort by SHA-256(seed ":" SHA-256(text)), hold out the smallest."""
    keyed = []
    for path in folder.rglob("*.py"):
        content = path.read_bytes()
        key = hashlib.sha256(b"7:" + hashlib.sha256(content).digest()).digest()
        keyed.append((key, int(key.hex()[:16], 16) / 2**64, content.decode()))
    keyed.sort()
    corpus = open_corpus(config_for(f"directory:{folder}", seed=7, eval_fraction=0.3))
    assert list(corpus.documents("eval")) == [text for _, share, text in keyed if share < 0.3]
    assert list(corpus.documents("train")) == [text for _, share, text in keyed if share >= 0.3]
    assert list(corpus.documents("train")) == list(corpus.documents("train"))


def test_splits_do_not_leak_and_lose_nothing(folder):
    write_documents(folder, {f"copy/{seed}.py": document(seed) for seed in range(0, 40, 2)})
    corpus = open_corpus(config_for(f"directory:{folder}", eval_fraction=0.5))
    train, held_out = set(corpus.documents("train")), set(corpus.documents("eval"))
    assert not train & held_out
    assert train | held_out == {document(seed) for seed in range(40)}
    assert corpus.statistics.duplicates == 20


def test_seed_changes_order_and_split(folder):
    first, second = (open_corpus(config_for(f"directory:{folder}", seed=seed, eval_fraction=0.5)) for seed in (0, 1))
    assert list(first.documents("eval")) != list(second.documents("eval"))
    assert first.fingerprint != second.fingerprint


def test_a_document_keeps_its_split_when_others_come(folder):
    spec = config_for(f"directory:{folder}", eval_fraction=0.5)
    before = set(open_corpus(spec).documents("eval"))
    write_documents(folder, {f"new/{seed}.py": document(seed) for seed in range(100, 130)})
    after = open_corpus(spec)
    assert before <= set(after.documents("eval"))
    assert not before & set(after.documents("train"))


def test_order_does_not_depend_on_paths(tmp_path):
    one = write_documents(tmp_path / "one", {f"{seed}.py": document(seed) for seed in range(20)})
    two = write_documents(tmp_path / "two", {f"deep/er/{40 - seed}.txt": document(seed) for seed in range(20)})
    first, second = (open_corpus(config_for(f"directory:{each}", eval_fraction=0.4)) for each in (one, two))
    assert first.fingerprint == second.fingerprint
    for split in ("train", "eval"):
        assert list(first.documents(split)) == list(second.documents(split))


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/*.py", {"a.py", "d/b.py", "d/e/c.py"}),
        ("*.py", {"a.py"}),
        ("d/**/*.py", {"d/b.py", "d/e/c.py"}),
        ("**/e/*", {"d/e/c.py", "d/e/n.txt"}),
        ("**/?.[tp]*", {"a.py", "d/b.py", "d/e/c.py", "d/e/n.txt"}),
        ("d/**", {"d/b.py", "d/e/c.py", "d/e/n.txt"}),
    ],
)
def test_glob(tmp_path, glob, expected):
    names = ["a.py", "d/b.py", "d/e/c.py", "d/e/n.txt"]
    folder = write_documents(tmp_path / "corpus", {name: name for name in names})
    corpus = open_corpus(config_for(f"directory:{folder}:{glob}", eval_fraction=0.5))
    found = {text for key in ("train", "eval") for text in documents_or_none(corpus, key)}
    assert found == expected


def documents_or_none(corpus, split):
    try:
        return list(corpus.documents(split))
    except InputError:
        return []


def test_a_folder_with_a_colon_in_its_name(tmp_path):
    folder = write_documents(tmp_path / "a:b", {"x.py": "x = 1"})
    assert open_corpus(config_for(f"directory:{folder}")).statistics.documents == 1
    assert open_corpus(config_for(f"directory:{folder}:*.py")).statistics.documents == 1


def test_jsonl_has_a_document_a_line(tmp_path):
    lines = [{"text": "one"}, {"content": "two"}, {"id": 3, "text": "one"}, {"text": "a\0b"}, {"text": None}]
    path = tmp_path / "corpus.jsonl"
    encoded = [json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join([*encoded, b"", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b""]))
    statistics = open_corpus(config_for(f"file:{path}")).statistics
    assert statistics == CorpusStatistics(documents=2, bytes=6, duplicates=1, binary=1, empty=1, undecodable=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"body": "x"}', "line 2: no text under .*found body"),
        ("[1]", "found list"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_corpus(config_for(f"file:{path}"))


def test_text_files_are_split_at_end_of_text(tmp_path):
    write_documents(tmp_path, {"a.txt": "one<|endoftext|>two<|endoftext|>", "b.py": "one<|endoftext|>two"})
    assert open_corpus(config_for(f"file:{tmp_path / 'a.txt'}")).statistics.documents == 2
    assert open_corpus(config_for(f"file:{tmp_path / 'b.py'}")).statistics.documents == 1


def test_installed_python_reads_its_roots_only(tmp_path, monkeypatch):
    files: dict[str, str | bytes] = {
        "lib/json/decoder.py": "stdlib",
        "lib/site-packages/old.py": "of another environment",
        "env/site-packages/torch/nn.py": "installed",
        "env/site-packages/torch/data.bin": "not Python",
    }
    write_documents(tmp_path, files)
    monkeypatch.setattr(local, "python_roots", lambda: [tmp_path / "lib", tmp_path / "env/site-packages"])
    corpus = open_corpus(config_for("installed-python", eval_fraction=0.5))
    assert corpus.statistics.documents == 2
    assert corpus.statistics.bytes == len("stdlib" + "installed")


def test_python_roots_hold_the_standard_library_and_the_packages():
    roots = local.python_roots()
    assert any((root / "json" / "decoder.py").is_file() for root in roots)
    assert any((root / "torch" / "__init__.py").is_file() for root in roots)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("directories:/tmp", "unknown corpus 'directories' .did you mean 'directory'"),
        ("directory:", "no folder"),
        ("directory:/nowhere/at/all", "no folder '/nowhere/at/all'"),
        ("directory:/nowhere:*.py", "no folder '/nowhere'"),
        ("file:", "no file"),
        ("file:/nowhere.txt", "no file '/nowhere.txt'"),
        ("installed-python:3.11", "takes no argument"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        open_corpus(config_for(spec))


@pytest.mark.parametrize("documents", [{}, {"a.bin": b"\0\1"}, {"a.py": b"", "b.py": b"\xff\xfe"}])
def test_a_corpus_without_usable_documents(tmp_path, documents):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_documents(folder, documents)
    with pytest.raises(InputError, match=r"no document that can be used \(0 documents"):
        open_corpus(config_for(f"directory:{folder}"))


def test_one_document_cannot_be_split(tmp_path):
    write_documents(tmp_path, {"a.txt": "only one"})
    corpus = open_corpus(config_for(f"file:{tmp_path / 'a.txt'}"))
    with pytest.raises(InputError, match="none of its 1 documents falls into the eval split"):
        corpus.documents("eval")


def test_a_file_that_changes_underway_is_an_error(folder):
    corpus = open_corpus(config_for(f"directory:{folder}"))
    for path in folder.rglob("*.py"):
        path.write_text("changed", encoding="utf-8")
    with pytest.raises(InputError, match="changed while the corpus was being read"):
        list(corpus.documents("train"))


def test_order_is_the_same_in_another_process(folder):
    code = (
        "import sys; from normfree.data import DataConfig, open_corpus\n"
        "print(open_corpus(DataConfig(corpus=sys.argv[1])).fingerprint)"
    )
    spec = f"directory:{folder}"
    command = [sys.executable, "-c", code, spec]
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == open_corpus(config_for(spec)).fingerprint
