"""Data: corpus -> tokenizer -> packed, memory-mapped blocks of tokens."""

from normfree.data.beginning import Beginning, natural_rule
from normfree.data.blocks import SplitStatistics, TokenBlocks
from normfree.data.configuration import DataConfig
from normfree.data.corpus import CORPORA, open_corpus
from normfree.data.documents import Corpus, CorpusStatistics
from normfree.data.packing import PackedData, load_packed_data, prepare_data, same_data
from normfree.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size

__all__ = [
    "CORPORA",
    "Beginning",
    "Corpus",
    "CorpusStatistics",
    "DataConfig",
    "PackedData",
    "SplitStatistics",
    "TokenBlocks",
    "load_packed_data",
    "load_tokenizer",
    "natural_rule",
    "open_corpus",
    "prepare_data",
    "same_data",
    "train_tokenizer",
    "vocabulary_size",
]
