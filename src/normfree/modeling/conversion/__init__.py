"""Hugging Face's models as configurations of the one decoder, with the same logits; one file a family."""

from normfree.modeling.conversion.from_hf_model import from_hf

__all__ = ["from_hf"]
