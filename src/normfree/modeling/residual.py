"""What writes into the residual stream."""

from __future__ import annotations

from torch import nn


class ResidualProjection(nn.Linear):
    """The last linear map of an attention or a feed-forward network; its output is added to the residual stream.

    A class of its own, because ``scale_residual_init`` must find it: transformers initializes module by module.
    """
