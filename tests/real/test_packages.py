"""Where the real models are: files found, parts joined, and what is damaged refused."""

from dataclasses import replace
from hashlib import sha256

import pytest
from examples.real_models.corpus import write_corpus
from examples.real_models.packages import GEMMA3, RealModel

from normfree.errors import InputError


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A made-up model in two packages."""
    whole = b"GGUF" + bytes(range(100))
    for n, part in enumerate((whole[:50], whole[50:])):
        package = tmp_path / "site" / f"made_up_part{n}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
        (package / "data" / "whole.gguf.part").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    parts = tuple((f"made_up_part{n}", "data/whole.gguf.part") for n in range(2))
    return RealModel("Made-Up", "whole.gguf", parts, sha256(whole).hexdigest(), "Q4_0", has_beginning=False)


def refused(model, folder, says):
    with pytest.raises(InputError, match=says) as error:
        model.path(folder / "cache")
    assert "\n" not in str(error.value)
    assert not (folder / "cache").exists() or not list((folder / "cache").iterdir())


def test_parts_are_joined_once_and_a_damaged_joined_file_again(model, tmp_path):
    assert model.is_installed
    path = model.path(tmp_path / "cache")
    assert path.name == "whole.gguf"
    assert sha256(path.read_bytes()).hexdigest() == model.sha256
    before = path.stat().st_mtime_ns
    assert model.path(tmp_path / "cache").stat().st_mtime_ns == before
    path.write_bytes(b"half")
    assert sha256(model.path(tmp_path / "cache").read_bytes()).hexdigest() == model.sha256
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["whole.gguf"]


def test_parts_that_do_not_join_are_refused(model, tmp_path):
    refused(replace(model, parts=model.parts[::-1]), tmp_path, "Made-Up: its file has the SHA-256 .* not .*damaged")
    refused(replace(model, parts=(model.parts[0], model.parts[0])), tmp_path, "parts of another version, or damaged")
    part = tmp_path / "site" / "made_up_part1" / "data" / "whole.gguf.part"
    part.write_bytes(part.read_bytes()[:-1])
    refused(model, tmp_path, "install it with: make real")
    part.unlink()
    refused(model, tmp_path, "package made_up_part1 has no file data/whole.gguf.part, a part of Made-Up")


def test_a_whole_file_is_checked_too(model, tmp_path):
    refused(replace(model, parts=model.parts[:1]), tmp_path, "Made-Up: its file has the SHA-256")


def test_a_package_that_is_missing_is_named(model, tmp_path):
    missing = replace(model, parts=(*model.parts, ("made_up_part2", "data/whole.gguf.part")))
    assert not missing.is_installed
    refused(missing, tmp_path, "Made-Up needs the package made_up_part2; install it with: make real")


@pytest.mark.real
def test_gemmas_own_parts_in_another_order_are_refused(path_of, tmp_path):
    path_of("gemma3")
    refused(replace(GEMMA3, parts=GEMMA3.parts[::-1]), tmp_path, "Gemma-3-270M: its file has the SHA-256")


def test_the_corpus_is_the_same_each_time(tmp_path):
    assert write_corpus(tmp_path / "a") == write_corpus(tmp_path / "b")
    names = [sorted(each.name for each in (tmp_path / folder).iterdir()) for folder in "ab"]
    assert names[0] == names[1]
    assert len(names[0]) > 60
    assert all(len(each.read_text()) <= 2000 for each in (tmp_path / "a").iterdir())
