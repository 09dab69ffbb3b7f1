"""The one decoder, with four swappable parts: norm, placement, activation and feed-forward network, attention."""

from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion import from_hf
from normfree.modeling.decoder import NormfreeForCausalLM, NormfreeModel

__all__ = ["NormfreeConfig", "NormfreeForCausalLM", "NormfreeModel", "from_hf"]
