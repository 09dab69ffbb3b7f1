"""The one decoder, with four swappable parts: norm, placement, activation and feed-forward network, attention."""

from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.conversion import from_hf
from normfree.modeling.convert_spark import to_spark
from normfree.modeling.decoder import NormfreeForCausalLM, NormfreeModel
from normfree.modeling.spark_decode import sparse_decode

__all__ = ["NormfreeConfig", "NormfreeForCausalLM", "NormfreeModel", "from_hf", "sparse_decode", "to_spark"]
