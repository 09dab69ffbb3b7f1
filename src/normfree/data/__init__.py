"""Data: corpus -> tokenizer -> packed, memory-mapped sequences."""

from normfree.data.beginning import Beginning, natural_rule
from normfree.data.corpus import CORPORA, open_corpus
from normfree.data.data_config import DataConfig
from normfree.data.documents import Corpus, CorpusStatistics
from normfree.data.packed_sequences import PackedSequences, SplitStatistics
from normfree.data.packing import PackedData, corpus_sequences, load_packed_data, prepare_data, same_data
from normfree.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size

__all__ = [
    "CORPORA",
    "Beginning",
    "Corpus",
    "CorpusStatistics",
    "DataConfig",
    "PackedData",
    "PackedSequences",
    "SplitStatistics",
    "corpus_sequences",
    "load_packed_data",
    "load_tokenizer",
    "natural_rule",
    "open_corpus",
    "prepare_data",
    "same_data",
    "train_tokenizer",
    "vocabulary_size",
]
