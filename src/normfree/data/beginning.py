"""What a sequence begins with: the special tokens that a tokenizer puts before a text, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from normfree.data.tokenizer import load_tokenizer
from normfree.errors import InputError

BeginningRule = Literal["none", "tokenizer", "bos_token"]
"""none: text only. tokenizer: what the tokenizer puts before a text. bos_token: the same, or its bos token."""

_PROBE = "The text 1."


@dataclass(frozen=True)
class Beginning:
    """The tokens that every sequence begins with, as ids and as the tokenizer writes them, and the rule that gave them.

    Sequences of text only have none.
    """

    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    rule: BeginningRule = "none"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rule: BeginningRule) -> Beginning:
        """The beginning that ``rule`` gives with ``tokenizer``.

        Raises:
            InputError: the rule asks for a token that the tokenizer lacks, or what the tokenizer adds cannot be told
                from the text.
        """
        if rule == "none":
            return cls()
        token_ids = added_before(tokenizer)
        if rule == "bos_token" and not token_ids:
            if tokenizer.bos_token_id is None:
                raise InputError("the tokenizer has no beginning-of-text token; leave --bos out")
            token_ids = (int(tokenizer.bos_token_id),)
        return cls(token_ids, tuple(map(str, tokenizer.convert_ids_to_tokens(list(token_ids)))), rule)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __str__(self) -> str:
        return f"each begins with {' '.join(self.tokens)}" if self.tokens else "no beginning-of-text token"

    def before(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` with the beginning in front, once: text that already begins with it stays as it is."""
        n = len(self.token_ids)
        return token_ids if tuple(token_ids[:n]) == self.token_ids else [*self.token_ids, *token_ids]

    def summary(self) -> dict[str, list[int] | list[str] | str]:
        """All fields, for JSON."""
        return {"token_ids": list(self.token_ids), "tokens": list(self.tokens), "rule": self.rule}


def natural_rule(tokenizer: str) -> BeginningRule:
    """``tokenizer`` if the tokenizer of that name or folder puts anything before a text, else ``none``.

    Raises:
        InputError: it cannot be loaded.
    """
    return "tokenizer" if added_before(load_tokenizer(tokenizer)) else "none"


def added_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of the special tokens that ``tokenizer`` puts before a text.

    They are read from an encoded text, not from ``bos_token_id``: many tokenizers have such a token and add none, and
    some add several. What a tokenizer adds after a text is not among them.

    Raises:
        InputError: the text is not found in its own encoding with special tokens.
    """
    text: list[int] = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer(_PROBE)["input_ids"])
    for n_before in range(len(whole) - len(text) + 1):
        if whole[n_before : n_before + len(text)] == text:
            return tuple(whole[:n_before])
    raise InputError(
        "what the tokenizer puts before a text cannot be told from the text: its encodings with and without special "
        "tokens have no text in common; say --bos or --no-bos"
    )
