"""Tokenizers: a byte-level BPE trained on the corpus itself, or one from the Hugging Face hub."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from normfree.errors import InputError
from normfree.modeling.gguf import is_gguf, load_gguf_tokenizer, open_gguf
from normfree.sources import hub_access, local_or_hub, no_source

END_OF_TEXT = "<|endoftext|>"

TRAINING_BYTES = 32 * 2**20
"""A tokenizer is trained on the first documents of this many UTF-8 bytes: the cost of BPE training grows with them, but
the most frequent pairs are settled well before."""
SMALLEST_PAIR_COUNT = 2
"""Least occurrences of a merge."""


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-2's kind: no prefix space, and all 256 bytes, so any text round-trips.

    The only special token, ``<|endoftext|>``, is both bos and eos and has id 0. The same texts give the same tokenizer.

    Args:
        texts: documents; those after the first :data:`TRAINING_BYTES` are not read.
        vocab_size: size of the vocabulary, special token included.

    Raises:
        InputError: the texts have too few repeated pairs for that vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=SMALLEST_PAIR_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_prefix(texts), trainer)
    learned = tokenizer.get_vocab_size()
    if learned != vocab_size:
        raise InputError(
            f"the train split supports a vocabulary of {learned}, vocab_size asks for {vocab_size}; "
            f"use a larger corpus or a vocab_size between 257 and {learned}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _prefix(texts: Iterable[str]) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        yield text
        n_bytes += len(text.encode("utf-8"))
        if n_bytes >= TRAINING_BYTES:
            return


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that name on the Hugging Face hub, or saved in that folder. Remote code is never run.

    Raises:
        InputError: it cannot be loaded; a missing path is not looked for on the hub.
    """
    name_or_path = local_or_hub(name_or_path, "tokenizer")
    if is_gguf(name_or_path):
        return load_gguf_tokenizer(open_gguf(Path(name_or_path)))
    try:
        with hub_access(name_or_path) as (name, options):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:
        raise InputError(
            f"cannot load tokenizer {name_or_path!r} ({no_source(name_or_path, 'tokenizer', error)}); give 'train', a "
            "tokenizer's name on the Hugging Face hub, or a folder with a saved tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{name_or_path!r} is a {type(tokenizer).__name__}, not a tokenizer; give another name")
    # transformers makes an empty tokenizer of the model's kind where it finds no files.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise InputError(f"{name_or_path!r} has no tokenizer files; give a tokenizer's name, or a folder with one")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs: one more than the largest token id (ids may have gaps)."""
    return int(max(tokenizer.get_vocab().values())) + 1
