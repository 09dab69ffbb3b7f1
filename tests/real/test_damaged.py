"""Damaged copies of the real models' files: every command refuses them in one line, and writes nothing."""

import shutil

import pytest

pytestmark = pytest.mark.real

N_HEADER = 4 * 2**20
"""Bytes of a file's head, tensors' names and the tokenizer among them, but hardly a weight."""

COMMANDS = {
    "entropy": ["--sequences", "2", "--sequence-length", "16", "--out", "out"],
    "depth": ["--sequences", "2", "--sequence-length", "16", "--out", "out"],
    "interpret": ["--sequences", "2", "--sequence-length", "16", "--out", "out"],
    "prune-layers": ["--drop", "3", "--out", "out"],
}


def truncated(path, copy):
    with path.open("rb") as whole, copy.open("wb") as part:
        part.write(whole.read(N_HEADER))


def another_magic(path, copy):
    truncated(path, copy)
    with copy.open("r+b") as file:
        file.write(b"GGML")


def short_of_its_last_bytes(path, copy):
    shutil.copyfile(path, copy)
    with copy.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def one_part(path, copy):
    truncated(path, copy.with_name("model-00001-of-00002.gguf"))


DAMAGE = [truncated, another_magic, short_of_its_last_bytes]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(command, damage, path_of, normfree, tmp_path, python_source):
    damage(path_of("smollm2"), tmp_path / "model.gguf")
    corpus = [] if command == "prune-layers" else ["--corpus", f"directory:{python_source}"]
    code, printed, said = normfree(command, "model.gguf", *corpus, *COMMANDS[command])
    assert (code, printed) == (2, "")
    assert len(said.strip().splitlines()) == 1
    assert "model.gguf" in said
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "cache") == ["model.gguf"]


def test_a_part_is_refused_as_a_part(path_of, normfree, tmp_path, python_source):
    one_part(path_of("gemma3"), tmp_path / "model.gguf")
    name = "model-00001-of-00002.gguf"
    code, _, said = normfree("entropy", name, "--corpus", f"directory:{python_source}", "--out", "out")
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
