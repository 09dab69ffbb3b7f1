"""Tiny tokenizers that put special tokens before a text, behind it, both or neither."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from normfree.data import train_tokenizer

from .made_up import document

VOCABULARY = 300
SPECIAL = {"<bos>": VOCABULARY, "<mask>": VOCABULARY + 1, "<eos>": VOCABULARY + 2}
TEMPLATES: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "nothing": (None, ()),
    "one": ("<bos> $A", (300,)),
    "several": ("<mask> <bos> $A", (301, 300)),
    "suffix": ("$A <eos>", ()),
    "both": ("<bos> $A <eos>", (300,)),
}
"""By name: the template of a text, and the ids before it."""


def tokenizer_with(template: str | None, *, bos_token: str | None = "<bos>") -> PreTrainedTokenizerFast:
    """A trained byte-level BPE whose post-processor adds special tokens."""
    tokenizer = train_tokenizer((document(seed) for seed in range(12)), VOCABULARY).backend_tokenizer
    tokenizer.add_special_tokens(list(SPECIAL))
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(SPECIAL.items()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos_token, eos_token="<eos>")


def saved(folder: Path, template: str | None, **options: Any) -> str:
    """The folder of such a tokenizer, as a string."""
    tokenizer_with(template, **options).save_pretrained(folder)
    return str(folder)


def tiny_llama(initializer_range: float = 0.5) -> LlamaForCausalLM:
    """A random model with a row for each of their tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            hidden_size=16,
            intermediate_size=32,
            vocab_size=VOCABULARY + len(SPECIAL),
            max_position_embeddings=64,
            initializer_range=initializer_range,
        )
    )
