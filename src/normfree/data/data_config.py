"""The configuration of a prepared corpus: every choice from documents to sequences."""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from normfree.data.beginning import BeginningRule
from normfree.data.corpus_name import full_corpus_name

Cut = Literal["chunks", "packed"]

SMALLEST_TRAINED_VOCABULARY = 257
"""The 256 bytes and the end-of-text token: a byte-level vocabulary cannot be smaller."""


class DataConfig(BaseModel):
    """A corpus, a tokenizer, and how the tokens are cut into sequences.

    corpus: ``installed-python``, ``directory:PATH[:GLOB]``, ``file:PATH``, ``pairs:PATH``, ``codeparrot`` or
        ``hf:NAME[@REVISION][:CONFIGURATION]`` (see :mod:`normfree.data.corpus`); the bare path of a file or folder
        becomes ``file:PATH`` or ``directory:PATH``.
    tokenizer: ``train`` for a byte-level BPE trained on the train split, otherwise the name or the folder of a Hugging
        Face tokenizer.
    vocab_size: vocabulary of the tokenizer to train, end-of-text token included. Only for ``tokenizer="train"``.
    sequence_length: T, tokens in a sequence.
    beginning: what every sequence and every document begins with: ``none`` (text only), ``tokenizer`` (the special
        tokens that the tokenizer puts before a text) or ``bos_token`` (the same; if it puts none, its
        beginning-of-text token). They count among the T tokens and are not predicted.
    cut: ``chunks`` cuts each document into sequences of its own and drops its shorter remainder (ReLU's Revival and the
        Hugging Face course). ``packed`` joins documents with the end-of-text token and drops only the last remainder.
    train_tokens, eval_tokens: upper bounds on the tokens of a split, rounded down to whole sequences; None takes the
        whole split.
    eval_fraction: probability that a document belongs to the eval split; unused by hub data sets with a validation
        split.
    max_document_bytes: documents larger than this are skipped: most are generated tables.
    seed: decides the split and the order of the documents.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: str = Field("installed-python", min_length=1)
    tokenizer: str = Field("train", min_length=1)
    vocab_size: int = Field(4096, ge=SMALLEST_TRAINED_VOCABULARY)
    sequence_length: int = Field(128, ge=2)
    beginning: BeginningRule = "none"
    cut: Cut = "chunks"
    train_tokens: int | None = Field(None, ge=1)
    eval_tokens: int | None = Field(None, ge=1)
    eval_fraction: float = Field(0.05, gt=0, lt=1)
    max_document_bytes: int = Field(262_144, ge=1)
    seed: int = 0

    @field_validator("corpus")
    @classmethod
    def _name_kind(cls, corpus: str) -> str:
        return full_corpus_name(corpus)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.tokenizer != "train" and "vocab_size" in self.model_fields_set:
            raise ValueError(
                f"vocab_size is {self.vocab_size} but tokenizer {self.tokenizer!r} brings its own "
                "vocabulary; leave vocab_size out or set tokenizer to 'train'"
            )
        if self.tokenizer == "train" and self.beginning != "none":
            raise ValueError(
                f"beginning is {self.beginning!r} but a tokenizer trained here puts nothing before a text; leave "
                "beginning out or name a tokenizer"
            )
        for name, cap in (("train_tokens", self.train_tokens), ("eval_tokens", self.eval_tokens)):
            if cap is not None and cap < self.sequence_length:
                raise ValueError(
                    f"{name} is {cap}, less than one sequence of {self.sequence_length} tokens; "
                    f"set {name} to at least {self.sequence_length}"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_does_not_apply(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A dumped config is read back with every field given, and vocab_size would be refused.
        fields: dict[str, Any] = serialize(self)
        if self.tokenizer != "train":
            fields.pop("vocab_size", None)
        # Runs on text only keep the configuration and fingerprint that they had before this field existed.
        if self.beginning == "none":
            fields.pop("beginning", None)
        return fields
