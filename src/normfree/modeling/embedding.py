"""Token embeddings, and the positions of tokens."""

from dataclasses import dataclass

import torch
from torch import nn

from normfree.errors import InputError
from normfree.model_options import Dimensions, option, positive, probability


@dataclass(kw_only=True)
class EmbeddingOptions(Dimensions):
    """Embedding
    ``embedding_multiplier``: a fixed factor of the token embeddings, in their dtype (Gemma: sqrt(``n_embd``));
    ``scale_embeddings``: the embeddings times one learned number, initially sqrt(``n_embd``) (the LLaMA models of
    "Transformers without Normalization"); ``embedding_dropout``: 0 by default.
    """

    scale_embeddings: bool = False
    embedding_multiplier: float | int | None = option(check=positive)
    embedding_dropout: float | int = option(0.0, check=probability)

    def check_together(self) -> None:
        if self.scale_embeddings and self.embedding_multiplier is not None:
            raise InputError("scale_embeddings learns the factor that embedding_multiplier fixes; give one of them")


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a fixed number (Vaswani et al. 2017, Section 3.4: sqrt(n_embd)).

    The number is rounded to the dtype of the weights before the product, as in Gemma. ``inputs_embeds`` are not scaled.
    """

    def __init__(self, vocab_size: int, n_embd: int, scale: float) -> None:
        super().__init__(vocab_size, n_embd)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = super().forward(input_ids)
        return embedded * torch.full((), self.scale, dtype=self.weight.dtype, device=embedded.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


def build_embedding(options: EmbeddingOptions) -> nn.Embedding:
    """The token embedding [vocab_size, n_embd]."""
    if options.embedding_multiplier is None:
        return nn.Embedding(options.vocab_size, options.n_embd)
    return ScaledEmbedding(options.vocab_size, options.n_embd, options.embedding_multiplier)


def positions_after(n_seen: int, x: torch.Tensor) -> torch.Tensor:
    """The positions of ``x`` [batch, T, n_embd] after ``n_seen`` others, padding counted: int64 [1, T]."""
    return (torch.arange(x.shape[1], device=x.device) + n_seen).unsqueeze(0)


def positions_among_tokens(n_seen: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """The number of tokens before each token, padding not counted: int64 [batch, T].

    ``attention_mask`` [batch, n_seen + T] is 1 for tokens and 0 for padding, whose position is 0.

    Raises:
        ValueError: the mask is of another kind, which does not say which tokens are padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "positions_skip_padding counts the tokens of an attention_mask [batch, T]; with another mask give "
            "position_ids as well"
        )
    tokens = attention_mask.long()
    return ((tokens.cumsum(dim=1) - 1) * tokens)[:, n_seen:]
