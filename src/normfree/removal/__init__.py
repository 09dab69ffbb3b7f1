"""LayerNorm removal: a trained model's norms taken out by fine-tuning, and folded away ("Transformers Don't Need
LayerNorm at Inference Time", arXiv 2507.02559).
"""

from normfree.removal.fold import remove_norms
from normfree.removal.publish import push_to_hub
from normfree.removal.removal import RemovalResult, remove
from normfree.removal.stock import to_stock

__all__ = ["RemovalResult", "push_to_hub", "remove", "remove_norms", "to_stock"]
