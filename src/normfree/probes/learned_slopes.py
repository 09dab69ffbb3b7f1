"""The negative slopes that activations learn."""

from __future__ import annotations

from collections.abc import Iterator

from torch.distributed.tensor import DTensor

from normfree.columns import NEGATIVE_SLOPE
from normfree.modeling.activations import LearnableLeakyReLU
from normfree.modeling.decoder import NormfreeForCausalLM
from normfree.probes.probe import LayerRow, WeightProbe


class LearnedSlopeProbe(WeightProbe):
    """``negative_slope`` of every layer whose activation learns one; a global slope has a row for each layer."""

    def __init__(self, model: NormfreeForCausalLM) -> None:
        super().__init__()
        self._blocks = model.model.blocks

    def read(self) -> Iterator[LayerRow]:
        for layer, block in enumerate(self._blocks):
            if isinstance(block.ffn.activation, LearnableLeakyReLU):
                slope = block.ffn.activation.negative_slope
                whole = slope.full_tensor() if isinstance(slope, DTensor) else slope
                yield LayerRow(layer, None, NEGATIVE_SLOPE, whole.item())
