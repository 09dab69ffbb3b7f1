"""Corpora on the Hugging Face hub, streamed."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from normfree.data.data_config import DataConfig
from normfree.data.documents import (
    Admission,
    Corpus,
    CorpusStatistics,
    Split,
    is_held_out,
    report_skipped,
    row_text,
    shuffle_key,
)
from normfree.errors import InputError

VALIDATION_SPLITS = ("validation", "valid", "dev")

SHUFFLE_BUFFER_DOCUMENTS = 10_000
"""Size of the sliding buffer that a stream is shuffled in (its shards are shuffled too)."""

CODEPARROT = {
    "train": "huggingface-course/codeparrot-ds-train",
    "validation": "huggingface-course/codeparrot-ds-valid",
}

CODEPARROT_VALIDATION_DOCUMENTS = 2_000
"""Held-out files in the reference code of ReLU's Revival."""


class HubCorpus(Corpus):
    """Rows of a data set on the Hugging Face hub, streamed, never downloaded whole.

    ``train`` and ``validation`` open a fresh stream of rows. Without ``validation`` the documents of ``train`` are
    split by hash. With it, documents of the validation split are left out of the train split and counted as duplicates
    (one pass over the validation split).
    """

    def __init__(
        self,
        fingerprint: str,
        config: DataConfig,
        train: Callable[[], Iterable[dict[str, Any]]],
        validation: Callable[[], Iterable[dict[str, Any]]] | None,
    ) -> None:
        self.fingerprint = fingerprint
        self._config = config
        self._streams = {"train": train, "eval": validation or train}
        self._has_validation = validation is not None
        self._statistics: dict[Split, CorpusStatistics] = {}
        self._validation_digests: frozenset[bytes] | None = None

    @property
    def statistics(self) -> CorpusStatistics:
        """What was kept and skipped among the rows read so far, in the last pass over each split."""
        return sum(self._statistics.values(), CorpusStatistics())

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in the order of the shuffled stream.

        Raises:
            InputError: the rows have no text column.
        """
        admission = Admission(self._config.max_document_bytes)
        if self._has_validation and split == "train":
            admission.digests |= self._held_out_digests()
        self._statistics[split] = admission.statistics
        try:
            for content, _ in self._admitted(split, admission):
                yield content.decode("utf-8")
        finally:
            report_skipped(f"{self._config.corpus} ({split})", admission.statistics, admission.max_document_bytes)

    def _admitted(self, split: Split, admission: Admission) -> Iterator[tuple[bytes, bytes]]:
        for row in self._streams[split]():
            content = row_text(row, f"corpus {self._config.corpus!r}").encode("utf-8", "surrogatepass")
            digest = hashlib.sha256(content).digest()
            if self._belongs(digest, split) and admission.admit(content, digest):
                yield content, digest

    def _belongs(self, digest: bytes, split: Split) -> bool:
        key = shuffle_key(self._config.seed, digest)
        return self._has_validation or is_held_out(key, self._config.eval_fraction) == (split == "eval")

    def _held_out_digests(self) -> frozenset[bytes]:
        if self._validation_digests is None:
            admission = Admission(self._config.max_document_bytes)
            self._validation_digests = frozenset(digest for _, digest in self._admitted("eval", admission))
        return self._validation_digests


def codeparrot(argument: str, config: DataConfig) -> Corpus:
    """Python files of GitHub, as in ReLU's Revival and the Hugging Face course.

    The paper's reference code downloads the data sets and shuffles them whole with seed 0. A stream is shuffled within
    a buffer: the same files in another order, of which a capped run sees another sample.
    """
    if argument:
        raise InputError(f"corpus {config.corpus!r}: codeparrot takes no argument; write 'codeparrot'")
    revisions = {split: _hub_revision(name, config.corpus) for split, name in CODEPARROT.items()}
    train, validation = (
        _open_hub(name, config, split=split, revision=revisions[split]) for split, name in CODEPARROT.items()
    )

    def shuffled(rows: Any) -> Any:
        return rows.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER_DOCUMENTS)

    return HubCorpus(
        "hub:" + ":".join(f"{name}@{revisions[split]}" for split, name in CODEPARROT.items()),
        config,
        lambda: shuffled(train),
        lambda: shuffled(validation).take(CODEPARROT_VALIDATION_DOCUMENTS),
    )


def hub(argument: str, config: DataConfig) -> Corpus:
    """``hf:NAME[@REVISION][:CONFIGURATION]``: any data set with a train split and a text column."""
    path, _, configuration = argument.partition(":")
    name, _, revision = path.partition("@")
    if not name:
        raise InputError(f"corpus {config.corpus!r} names no data set; write hf:NAME[@REVISION][:CONFIGURATION]")
    revision = _hub_revision(name, config.corpus, revision or None)
    splits = _open_hub(name, config, name=configuration or None, revision=revision)
    if "train" not in splits:
        raise InputError(f"corpus {config.corpus!r} has no train split; its splits: {', '.join(splits)}")
    validation = next((splits[split] for split in VALIDATION_SPLITS if split in splits), None)
    return HubCorpus(
        f"hub:{name}@{revision}:{configuration}",
        config,
        lambda: splits["train"].shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER_DOCUMENTS),
        None if validation is None else lambda: validation,
    )


def _hub_revision(name: str, corpus: str, revision: str | None = None) -> str:
    """The commit of a revision, by which the same data can be read again."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise _hub_failure(name, corpus, error) from error


def _open_hub(path: str, config: DataConfig, **choices: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, streaming=True, **choices)
    except Exception as error:
        raise _hub_failure(path, config.corpus, error) from error


def _hub_failure(name: str, corpus: str, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(
        f"corpus {corpus!r}: cannot open {name!r} on the Hugging Face hub ({reason}); "
        "check the name and the connection, or use a local corpus such as 'installed-python'"
    )
