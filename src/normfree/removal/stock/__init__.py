"""Models with constant stds as stock models of transformers, whose norms stay and do nothing; one file a family."""

from normfree.removal.stock.export import to_stock

__all__ = ["to_stock"]
