"""What writes into the residual stream, and how large weights start."""

from __future__ import annotations

from torch import nn

INITIAL_SCALE = "initial_scale"
"""The attribute of a linear map whose weights start that many times as large as others.

It stands at the map itself: transformers hands no module without weights of its own to ``_init_weights``.
"""


class ResidualProjection(nn.Linear):
    """The last linear map of an attention or a feed-forward network; its output is added to the residual stream.

    A class of its own, because ``scale_residual_init`` must find it: transformers initializes module by module.
    """
