"""From a corpus to a folder of packed sequences, built once and used again.

``cache_dir/<fingerprint>/`` holds ``train.npy``, ``eval.npy``, ``tokenizer/`` and ``data.json`` (the config, what was
kept and dropped, and the size and SHA-256 of every other file). It is built next to its final place and renamed, so it
is there whole or not at all; of two processes that build it at once, the slower uses the other's.
"""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from normfree.data.beginning import Beginning
from normfree.data.corpus import open_corpus
from normfree.data.data_config import DataConfig
from normfree.data.documents import Corpus, Split
from normfree.data.packed_sequences import PackedSequences, SplitStatistics, write_sequences
from normfree.data.pairs import PairCorpus, write_pairs
from normfree.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from normfree.errors import InputError
from normfree.files import ANOTHER_CACHE, check_output_folder, first_difference, sha256
from normfree.locks import locked, remove_abandoned
from normfree.progress import stage

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the fingerprint: raise it when the same config and corpus would give other tokens or files."""

SPLITS: tuple[Split, ...] = get_args(Split)

NEARLY_ALL = 1 - 1e-9
"""Share of a corpus' documents to measure on: none need to be kept for training."""

Report = Callable[[int], object]


@dataclass(frozen=True)
class PackedData:
    """A prepared corpus.

    statistics: ``corpus`` (:class:`~normfree.data.documents.CorpusStatistics`), ``train`` and ``eval``
        (:class:`~normfree.data.packed_sequences.SplitStatistics` and ``bytes_per_token``) as dictionaries, and
        ``vocab_size``; as counted when the folder was built.
    """

    folder: Path
    fingerprint: str
    train: PackedSequences
    eval: PackedSequences
    tokenizer: PreTrainedTokenizerBase
    statistics: dict[str, Any]


def prepare_data(config: DataConfig, cache_dir: Path) -> PackedData:
    """Packed sequences for ``config``: those in ``cache_dir`` if they are there and whole, else new ones.

    A local corpus is always read through, to know whether it changed. A damaged folder is logged and built again.

    Args:
        config: the corpus, the tokenizer and the cut.
        cache_dir: created if it is missing.

    Raises:
        InputError: the corpus cannot be opened, or has no usable document or too few tokens for one sequence of each
            split; or the tokenizer cannot be loaded or trained, or has no end-of-text token for cut ``packed``.
    """
    with stage(f"preparing {config.corpus}"):
        corpus = open_corpus(config)
        tokenizer = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
        fingerprint = _fingerprint(config, corpus, tokenizer)
        folder = cache_dir / fingerprint
        _remove_abandoned(folder)
        if folder.exists():
            damage = _damage(folder)
            if damage is None:
                log.debug("tokens of %s are in %s", config.corpus, folder)
                return _open(folder)
            log.warning("prepared data in %s is damaged (%s); building it again", folder, damage)
        with _built_in_place(folder) as building:
            _build(building, config, corpus, tokenizer, fingerprint)
    return _open(folder)


def same_data(config: DataConfig, cache_dir: Path, fingerprint: str) -> PackedData:
    """The tokens of an earlier run with ``config``: those in ``cache_dir``, even if the corpus has changed.

    Raises:
        InputError: they are not in the cache, and the corpus cannot be used or has changed.
    """
    if not re.fullmatch("[0-9a-f]{16}", fingerprint):
        raise InputError(
            f"corpus fingerprint {fingerprint!r} is not 16 hexadecimal digits; restore it, or leave it out"
        )
    folder = cache_dir / fingerprint
    _remove_abandoned(folder)
    if folder.exists() and _damage(folder) is None:
        return _open(folder)
    data = prepare_data(config, cache_dir)
    if data.fingerprint != fingerprint:
        raise InputError(
            f"the tokens {fingerprint} are not in {cache_dir}, and corpus {config.corpus} has changed since they were "
            f"made (now {data.fingerprint}); give the cache they are in with --cache-dir, or begin in another folder, "
            "without the provenance of an earlier run"
        )
    return data


def corpus_sequences(
    corpus: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, n_sequences: int, beginning: Beginning
) -> torch.Tensor:
    """The first ``n_sequences`` sequences of a corpus, or all if fewer, to measure on: int64 [n, sequence_length].

    Each is from within one document and begins with the tokens of ``beginning``. Nothing is kept on disk.

    Raises:
        InputError: the corpus cannot be used.
    """
    opened = open_corpus(DataConfig.model_validate({"corpus": corpus, "eval_fraction": NEARLY_ALL}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        write_sequences(
            path,
            opened.documents("eval"),
            tokenizer,
            sequence_length=sequence_length,
            beginning=beginning.token_ids,
            max_tokens=n_sequences * sequence_length,
        )
        packed = PackedSequences(path)
        return packed.whole()[0] if len(packed) else torch.empty(0, sequence_length, dtype=torch.int64)


def load_packed_data(folder: Path) -> PackedData:
    """The packed data in a folder made by :func:`prepare_data`, without opening the corpus.

    Raises:
        InputError: the folder is missing, or one of its files is missing or changed.
    """
    damage = _damage(folder)
    if damage is not None:
        raise InputError(f"prepared data in {folder} cannot be used ({damage}); prepare it again")
    return _open(folder)


def _open(folder: Path) -> PackedData:
    record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return PackedData(
        folder=folder,
        fingerprint=record["fingerprint"],
        train=_sequences(folder, "train"),
        eval=_sequences(folder, "eval"),
        tokenizer=load_tokenizer(str(folder / "tokenizer")),
        statistics=record["statistics"],
    )


def _sequences(folder: Path, split: Split) -> PackedSequences:
    predicted = folder / f"{split}_predicted.npy"
    return PackedSequences(folder / f"{split}.npy", predicted if predicted.exists() else None)


def _fingerprint(config: DataConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """16 hexadecimal digits for the tokens; the same documents at another path have the same."""
    parts = config.model_dump(mode="json", exclude={"corpus", "tokenizer", "beginning"})
    parts["format_version"] = FORMAT_VERSION
    parts["documents"] = corpus.fingerprint
    parts["tokenizer"] = "train" if tokenizer is None else _tokenizer_identity(tokenizer)
    if tokenizer is not None and (beginning := Beginning.of(tokenizer, config.beginning)):
        parts["beginning"] = beginning.token_ids
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    named = f"{type(tokenizer).__name__}:{tokenizer.eos_token_id}:{rules}"
    return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()


def _build(
    folder: Path,
    config: DataConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    fingerprint: str,
) -> None:
    if tokenizer is None:
        with stage("training the tokenizer"):
            tokenizer = train_tokenizer(corpus.documents("train"), config.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    statistics: dict[str, Any] = {}
    for split in SPLITS:
        with stage(f"packing the {split} split", _cap(split, config), unit="tokens") as progress:
            found = _write_split(folder, split, config, corpus, tokenizer, lambda done: progress.update(done=done))
        if not found.blocks:
            raise _too_small(split, found, config)
        statistics[split] = {**dataclasses.asdict(found), "bytes_per_token": found.bytes_per_token}
    kept = dataclasses.asdict(corpus.statistics)
    record: dict[str, Any] = {
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
        "statistics": {"corpus": kept, **statistics, "vocab_size": vocabulary_size(tokenizer)},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    record["sha256"] = _own_sha256(record)
    (folder / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_split(
    folder: Path, split: Split, config: DataConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, report: Report
) -> SplitStatistics:
    path, predicted = folder / f"{split}.npy", folder / f"{split}_predicted.npy"
    beginning = Beginning.of(tokenizer, config.beginning).token_ids
    options: dict[str, Any] = {
        "sequence_length": config.sequence_length,
        "beginning": beginning,
        "max_tokens": _cap(split, config),
        "report": report,
    }
    if isinstance(corpus, PairCorpus):
        return write_pairs(path, predicted, corpus.pairs(split), tokenizer, **options)
    options |= {"separator": _separator(tokenizer, config), "predicted_path": predicted if beginning else None}
    return write_sequences(path, corpus.documents(split), tokenizer, **options)


def _cap(split: Split, config: DataConfig) -> int | None:
    return config.train_tokens if split == "train" else config.eval_tokens


def _separator(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> int | None:
    if config.cut == "chunks":
        return None
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {config.tokenizer!r} has no end-of-text token to join documents with; "
            "use cut 'chunks' or another tokenizer"
        )
    return int(tokenizer.eos_token_id)


def _too_small(split: Split, statistics: SplitStatistics, config: DataConfig) -> InputError:
    T = config.sequence_length
    needed = f"at least {T} in one document" if config.cut == "chunks" else f"at least {T}"
    return InputError(
        f"corpus {config.corpus!r}: the {split} split has {statistics.document_tokens} tokens in "
        f"{statistics.documents} documents, one sequence needs {needed}; use a larger corpus, "
        "a smaller sequence_length, or another eval_fraction or seed"
    )


@contextmanager
def _built_in_place(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` at the end."""
    check_output_folder(folder.parent, ANOTHER_CACHE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with locked(temporary):
        building = temporary / "new"
        building.mkdir()
        try:
            yield building
            _move_into_place(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes temporary folders of killed processes."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        remove_abandoned(left)


def _move_into_place(building: Path, folder: Path) -> None:
    if folder.exists() and _damage(folder) is not None:
        shutil.rmtree(folder)
    try:
        building.rename(folder)
    except OSError:
        # Another process may have finished first; its folder is the same.
        if _damage(folder) is not None:
            raise


def _damage(folder: Path) -> str | None:
    """What is wrong with a prepared folder; None if nothing is."""
    try:
        record = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        expected = {name: (int(each["bytes"]), str(each["sha256"])) for name, each in record["files"].items()}
        # Older folders have none.
        if record.get("sha256", _own_sha256(record)) != _own_sha256(record):
            return "data.json is not as it was written"
    except OSError as error:
        return f"data.json cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "data.json is not as it was written"
    return first_difference(folder, expected)


def _own_sha256(record: dict[str, Any]) -> str:
    """SHA-256 of all other entries of ``data.json``."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
