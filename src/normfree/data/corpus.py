"""Corpora by name: a string ``KIND`` or ``KIND:ARGUMENT``; a bare path is ``file:`` or ``directory:``."""

from collections.abc import Callable

from normfree.data.corpus_name import check_corpus_name
from normfree.data.data_config import DataConfig
from normfree.data.documents import Corpus
from normfree.data.hub import codeparrot, hub
from normfree.data.local import directory, installed_python, text_file
from normfree.data.pairs import prompt_completion_pairs

CORPORA: dict[str, Callable[[str, DataConfig], Corpus]] = {
    "installed-python": installed_python,
    "directory": directory,
    "file": text_file,
    "codeparrot": codeparrot,
    "hf": hub,
    "pairs": prompt_completion_pairs,
}
"""By kind, the part before the first colon: a function of the part after it and the config."""


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus named by ``config.corpus``.

    Raises:
        InputError: an unknown kind, a missing path, an unreachable data set, or no usable document.
    """
    check_corpus_name(config.corpus)
    kind, _, argument = config.corpus.partition(":")
    return CORPORA[kind](argument, config)
