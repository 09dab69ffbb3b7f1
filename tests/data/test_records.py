"""Files of records, whatever their names look like; long texts; what is skipped is said."""

import bz2
import gzip
import json
import logging
import lzma

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normfree.data import DataConfig, open_corpus, prepare_data
from normfree.data.passages import passages
from normfree.errors import InputError

from .made_up import document, write_documents

TEXTS = [f'text {i}, with\na line, "quotes" and naïve Σ' for i in range(12)]
LINES = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)).encode()
ARRAY = json.dumps([{"content": text} for text in TEXTS], indent=1).encode()
FRAME = pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})
FILES = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.b.NdJson": b"\xef\xbb\xbf" + LINES,
    "lines.json": LINES,
    "array.json": ARRAY,
    "texts.JSON": json.dumps(TEXTS).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "array.json.bz2": bz2.compress(ARRAY),
    "a.ndjson.XZ": lzma.compress(LINES),
    "a.csv": FRAME.to_csv(index=False).encode(),
    "a.TSV": FRAME.to_csv(index=False, sep="\t").encode(),
    "a.csv.gz": gzip.compress(FRAME.to_csv(index=False).encode()),
    "a.txt.gz": gzip.compress("<|endoftext|>".join(TEXTS).encode()),
    "a.TXT": "<|endoftext|>".join(TEXTS).encode(),
}


def all_documents(path, **options):
    corpus = open_corpus(DataConfig(corpus=f"file:{path}", eval_fraction=0.5, **options))
    return [text for split in ("train", "eval") for text in corpus.documents(split)]


@pytest.mark.parametrize("name", FILES)
def test_every_record_is_a_document(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert sorted(all_documents(tmp_path / name)) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET"])
def test_parquet_rows_are_documents(name, tmp_path):
    FRAME.to_parquet(tmp_path / name)
    assert sorted(all_documents(tmp_path / name)) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"title,body\nx,y\n", "no column 'text' or 'content' .found title, body"),
        ("a.tsv", b"title\tbody\nx\ty\n", "found title, body"),
        ("a.json", b'[{"body": "x"}]', "entry 1: no text under .*found body"),
        ("a.json", b'{"body": "x"}', "entry 1: no text under .*found body"),
        ("a.json", b"[1, 2]", "entry 1: no text under"),
        ("a.json", b"[{]", "not JSON"),
        ("a.json", b"prose", "line 1: not JSON"),
        ("a.json", b"[" * 100_000, "not JSON that can be read"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        ("a.NDJSON", b'{"body": "x"}', "line 1: no text under .*found body"),
        ("a.csv", b"", "not a table"),
        ("a.csv", b'text\n"open', "not a table"),
        ("a.csv", b"text\n\xff\n", "byte 5 is not UTF-8"),
        ("a.csv", b"text\nx\0y\n", "a NUL byte at character 6"),
        ("a.parquet", b"PAR1 broken", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.jsonl.gz", LINES, "no whole .gz file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "no whole .gz file"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-20], "no whole .xz file"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-20], "no whole .bz2 file"),
        ("a.jsonl.zst", LINES, ".zst is not read; unpack it"),
        ("a.zip", LINES, ".zip is not read; unpack it"),
    ],
)
def test_files_that_are_not_what_their_names_say(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        open_corpus(DataConfig(corpus=f"file:{tmp_path / name}"))
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_a_text_column_names_those_there_are(tmp_path):
    pd.DataFrame({"title": ["x"], "body": ["y"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="found title, body"):
        open_corpus(DataConfig(corpus=f"file:{tmp_path / 'a.parquet'}"))
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="no text under"):
        open_corpus(DataConfig(corpus=f"file:{tmp_path / 'numbers.parquet'}"))


def test_records_in_a_folder_are_said_to_be_read_as_text(tmp_path, caplog):
    write_documents(tmp_path / "c", {"a.JSONL": LINES, "b.csv": FILES["a.csv"], "c.py": "x = 1", "package.json": "{}"})
    with caplog.at_level(logging.WARNING, "normfree"):
        corpus = open_corpus(DataConfig(corpus=f"directory:{tmp_path / 'c'}"))
    assert corpus.statistics.documents == 4
    assert "2 files of records such as" in caplog.text
    assert "file:PATH" in caplog.text


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_megabyte_of_text_in_one_file_simply_works(kind, tmp_path, caplog):
    lines = (f"SPEAKER {i % 40}:\n{document(i, 12)}\n\n" for i in range(20_000))
    text = ""
    while len(text) < 1_100_000:
        text += next(lines)
    write_documents(tmp_path / "c", {"input.txt": text})
    spec = f"file:{tmp_path / 'c' / 'input.txt'}" if kind == "file" else f"directory:{tmp_path / 'c'}"
    config = DataConfig(corpus=spec, vocab_size=300, train_tokens=4096, eval_tokens=1024)
    data = prepare_data(config, tmp_path / "cache")
    corpus = data.statistics["corpus"]
    assert corpus["bytes"] + 8192 * corpus["duplicates"] >= len(text.encode())
    assert corpus["too_large"] == 0
    assert len(data.eval) == 8
    assert not caplog.text


def test_large_files_among_others_stay_skipped_and_are_said_to_be(tmp_path, caplog):
    documents: dict[str, str | bytes] = {f"{seed}.py": document(seed) for seed in range(10)}
    write_documents(tmp_path / "c", documents | {"table.py": "x = 1\n" * 100_000, "a.bin": b"\0", "b.py": b"\xff\xff"})
    with caplog.at_level(logging.WARNING, "normfree"):
        corpus = open_corpus(DataConfig(corpus=f"directory:{tmp_path / 'c'}", eval_fraction=0.5))
    assert corpus.statistics.documents == 10
    assert corpus.statistics.too_large == 1
    (line,) = caplog.messages
    assert "3 of 13 documents are skipped" in line
    assert "1 larger than 262144 bytes (data.max_document_bytes admits them)" in line
    assert "1 with a NUL byte" in line
    assert "1 not UTF-8" in line
    caplog.clear()
    admitted = open_corpus(DataConfig(corpus=f"directory:{tmp_path / 'c'}", max_document_bytes=10**6))
    assert admitted.statistics.documents == 11


@given(st.text(alphabet="ab\nΣ", max_size=300), st.integers(1, 40))
def test_passages_are_the_text(text, most):
    found = list(passages(text, most))
    assert "".join(found) == text
    assert all(0 < len(each) <= most for each in found)


def test_passages_end_at_blank_lines_or_line_ends():
    found = list(passages("aaa\n\nbbb\n\nccc\n\n" * 20, 12))
    assert all(each.endswith("\n\n") for each in found)
    assert all(each.endswith("\n") for each in passages("aaa\nbbb\n" * 20, 10))
