"""Every command that measures a model says what its sequences begin with."""

import json

import pytest

from tests.data.beginnings import TEMPLATES, saved, tiny_llama

T, N_SEQUENCE = 24, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer puts one token before a text and one behind it."""
    folder = tmp_path_factory.mktemp("models") / "both"
    tiny_llama().save_pretrained(folder)
    saved(folder, TEMPLATES["both"][0])
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("entropy",),
        ("depth", "--probes", 2),
        ("interpret", "--neurons", 1),
        ("prune-layers", "--drop-similar", 1),
    ],
)
def test_every_command_says_how_sequences_begin(command, model, corpus_folder, normfree, tmp_path):
    options = ("--corpus", f"directory:{corpus_folder}", "--sequence-length", T, "--sequences", N_SEQUENCE)
    for choice, tokens in (((), ["<bos>"]), (("--no-bos",), []), (("--bos",), ["<bos>"])):
        folder = tmp_path / "".join(choice) / "out"
        arguments = (command[0], model, *command[1:], *options, *choice, "--out", folder)
        code, text, err = normfree(*arguments, "--json")
        assert code == 0, err
        assert json.loads(text)["beginning"]["tokens"] == tokens
    code, text, err = normfree(*arguments[:-1], tmp_path / "shown")
    assert code == 0, err
    assert "each begins with <bos>" in " ".join(text.split())
    report = tmp_path / "shown" / "report.html"
    assert not report.exists() or "each begins with &lt;bos&gt;" in report.read_text()
