"""How large weights start, where transformers' rule for their kind of module is not enough."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

INITIAL_SCALE = "initial_scale"
"""The attribute of a linear map whose weights start that many times as large as others.

It is set on the map itself: transformers hands no module without weights of its own to ``_init_weights``.
"""


class ResidualProjection(nn.Linear):
    """The last linear map of an attention or a feed-forward network; its output is added to the residual stream.

    A class of its own, because ``scale_residual_init`` must find it: transformers initializes module by module.
    """


@runtime_checkable
class InitializesItself(Protocol):
    """A module with its own initial values.

    It sets them with :mod:`transformers.initialization`, which leaves weights that a file has given as they are.
    """

    def set_initial_values(self) -> None: ...
