"""Angular distance of layers (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from normfree.columns import STANDARD_ERROR
from normfree.errors import InputError
from normfree.interpret.depth.averages import mean_and_standard_error


def angular_distances(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """arccos(cos(x_l, x_m)) / π of all pairs of streams: at the last token, and the mean over all tokens.

    0 is the same direction, 1/2 a right angle, 1 the opposite. NaN for entries that are not finite and tokens of zeros.

    Returns:
        float64 [2, n_layer + 1, n_layer + 1, batch].
    """
    found = []
    for sequence in zip(*streams, strict=True):  # one at a time: float64 takes memory
        x = torch.stack([stream.detach().double() for stream in sequence], dim=1)
        direction = x / x.norm(dim=-1, keepdim=True)
        angles = (direction @ direction.transpose(1, 2)).clamp(-1, 1).arccos() / torch.pi
        found.append(torch.stack([angles[-1], angles.mean(dim=0)]).cpu())
    return torch.stack(found, dim=-1)


def angular_distance_frame(distances: torch.Tensor) -> pd.DataFrame:
    """The frame ``angular_distance`` of a measurement, from :func:`angular_distances` of all sequences.

    Returns:
        layer and n_apart (the stream at the input of block ``layer`` against that ``n_apart`` blocks later; the sum is
        at most n_layer), angular_distance (at the last token, as Gromov et al.; mean over sequences, in units of π),
        standard_error (over sequences), angular_distance_all_tokens.
    """
    (last, mean), (error, _) = mean_and_standard_error(distances)
    pairs = [(layer, n_apart) for n_apart in range(1, len(last)) for layer in range(len(last) - n_apart)]
    frame = pd.DataFrame(pairs, columns=["layer", "n_apart"])
    place = (frame["layer"], frame["layer"] + frame["n_apart"])
    columns = {"angular_distance": last, STANDARD_ERROR: error, "angular_distance_all_tokens": mean}
    return frame.assign(**{name: values[place] for name, values in columns.items()})


def most_similar_block(distances: pd.DataFrame, n_drop: int) -> list[int]:
    """The ``n_drop`` consecutive layers across which the angular distance is smallest (Gromov et al., 2024).

    Args:
        distances: the frame of :func:`angular_distance_frame`.
        n_drop: from 1 to n_layer − 1.

    Raises:
        InputError: another number, or a distance across so many layers is not finite.
    """
    n_layer = int(distances["layer"].max()) + 1
    if not 1 <= n_drop < n_layer:
        raise InputError(f"cannot choose {n_drop} of {n_layer} layers to drop; give 1 to {n_layer - 1}")
    across = distances[distances["n_apart"] == n_drop]
    if across["angular_distance"].isna().any():
        raise InputError(
            f"the angular distance across {n_drop} layers is not finite everywhere: the model has NaN or Inf in its "
            "residual stream; name the layers to drop"
        )
    first = int(across["layer"].to_numpy()[across["angular_distance"].to_numpy().argmin()])
    return list(range(first, first + n_drop))
