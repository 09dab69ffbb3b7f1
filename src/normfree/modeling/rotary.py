"""Rotary positions (Su et al. 2021): one set of parameters for all layers, or one for each kind of layer (Gemma 3)."""

from copy import copy
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from normfree.errors import InputError, unknown_name
from normfree.model_options import one_of, option
from normfree.modeling.layer_types import MASKS, LayerTypeOptions
from normfree.spark.sizes import SparkOptions
from normfree.spark.sparse_attention import Rotation

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
ROPE_PARAMETERS = (*RopeParameters.__annotations__, "type")


@dataclass(kw_only=True)
class PositionOptions(LayerTypeOptions, SparkOptions):
    """Positions
    ``position``: ``learned | rotary``; ``positions_skip_padding``: positions count the tokens of ``attention_mask``
    only (OPT), instead of all, padding included (learned only); ``rope_parameters``: transformers' dictionary
    (``rope_type``, ``rope_theta``, ``partial_rotary_factor``, ...), or one for each kind in ``layer_types``, by its
    name (Gemma 3), rotary only.
    """

    position: str = option("learned", check=one_of(("learned", "rotary")))
    positions_skip_padding: bool = False
    rope_parameters: dict[str, Any] | None = None

    def check_together(self) -> None:
        if self.rope_parameters and self.position != "rotary":
            raise InputError(f"rope_parameters mean nothing with position {self.position!r}; use position: rotary")
        if self.positions_skip_padding and self.position != "learned":
            raise InputError(
                f"positions_skip_padding means nothing with position {self.position!r}, whose scores depend on "
                "differences of positions; leave it out"
            )


class RotaryByLayerType(nn.ModuleDict):
    """The rotary embeddings of a decoder whose kinds of layers have parameters of their own."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Rotation]:
        return {kind: rotary(x, position_ids) for kind, rotary in self.items()}


def build_rotary(options: PositionOptions) -> nn.Module | None:
    """The rotary embedding of a decoder; None with other positions.

    GPT-NeoX's reads only what every rotary configuration of transformers has.
    """
    if options.position != "rotary":
        return None
    built = {}
    for kind, parameters in parameter_sets(options).items():
        of_kind = copy(options)
        of_kind.rope_parameters = parameters
        built[str(kind)] = GPTNeoXRotaryEmbedding(cast(Any, of_kind))
    return built["None"] if "None" in built else RotaryByLayerType(built)


def rotations(
    rotary: nn.Module | None, kinds: list[str], x: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Rotation | None]:
    """What turns the queries and keys of each kind of layer; None without rotary positions.

    x: [batch, T, n_embd], for its dtype and device; position_ids: int64 [batch or 1, T].
    """
    if isinstance(rotary, RotaryByLayerType):
        return dict(rotary(x, position_ids))
    return dict.fromkeys(kinds, None if rotary is None else rotary(x, position_ids))


def parameter_sets(options: PositionOptions) -> dict[str | None, dict[str, Any]]:
    """The sets of rotary parameters by kind of layer; under None where all layers share one."""
    parameters = options.rope_parameters or {}
    if not _is_nested(parameters):
        return {None: parameters}
    return {kind: parameters[kind] for kind in dict.fromkeys(options.layer_types)}


def settled_parameters(options: PositionOptions) -> dict[str, Any]:
    """A copy of ``rope_parameters``, for transformers to fill in; one set where there is one kind of layer.

    Raises:
        InputError: a kind of layer has no set, or a set no layer.
    """
    given = options.rope_parameters or {}
    if not _is_nested(given):
        return dict(given)
    kinds = set(options.layer_types)
    for kind, parameters in given.items():
        if kind not in MASKS:
            raise unknown_name("layer type in rope_parameters", kind, MASKS)
        if kind not in kinds:
            raise InputError(f"rope_parameters of {kind} mean nothing: layer_types has no such layer; leave them out")
        if not isinstance(parameters, dict):
            raise InputError(
                f"rope_parameters of {kind} are {parameters!r}; give a dictionary with rope_type and rope_theta"
            )
    if kinds - given.keys():
        missing = sorted(kinds - given.keys())[0]
        raise InputError(f"rope_parameters have no set for {missing}, which layer_types has; give one for each kind")
    copies = {kind: dict(parameters) for kind, parameters in given.items()}
    return next(iter(copies.values())) if len(copies) == 1 else copies


def outgrows_cached_keys(
    options: PositionOptions, input_ids: torch.Tensor, cache: Cache | None, attention_mask: torch.Tensor | None
) -> bool:
    """True if the longest sequence exceeds the original length with this step's tokens and did not before.

    With ``rope_type: longrope`` frequencies change there. Cached keys are rotated by the earlier ones, so they have to
    be computed again, as in Phi-3.

    ``input_ids`` [batch, T] are all tokens so far, and ``attention_mask`` [batch, T] is 0 for padding.
    """
    sets = parameter_sets(options).values()
    originals = [each["original_max_position_embeddings"] for each in sets if each.get("rope_type") == "longrope"]
    n_cached = 0 if cache is None else int(cache.get_seq_length())
    if not originals or n_cached == 0:
        return False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    longest, cached = int(mask.sum(-1).max()), int(mask[:, :n_cached].sum(-1).max())
    return any(cached <= original < longest for original in originals)


def check_parameters(options: PositionOptions) -> None:
    """Checks ``rope_parameters`` in transformers' standard form, as far as transformers does not.

    Raises:
        InputError: an unknown name, or a value out of range.
    """
    for parameters in parameter_sets(options).values():
        _check_set(options, parameters)


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(name in MASKS or isinstance(value, dict) for name, value in parameters.items())


def _check_set(options: PositionOptions, parameters: dict[str, Any]) -> None:
    for name in parameters:
        if name not in ROPE_PARAMETERS:
            raise unknown_name("name in rope_parameters", name, ROPE_PARAMETERS)
    if parameters["rope_type"] not in ROPE_TYPES:
        raise unknown_name("rope_type", parameters["rope_type"], ROPE_TYPES)
    fraction = parameters.get("partial_rotary_factor", 1.0)
    for name, value in (("rope_theta", parameters["rope_theta"]), ("partial_rotary_factor", fraction)):
        if not isinstance(value, (int, float)) or not 0 < value < inf:
            raise InputError(f"{name} is {value!r}; it must be a positive, finite number")
    rotated = int(options.head_dim * fraction)
    if not 1 <= rotated <= options.head_dim - options.head_dim % 2:
        raise InputError(
            f"rotary positions turn pairs of dimensions, but partial_rotary_factor {fraction} names {rotated} of "
            f"the head_dim = {options.head_dim}; use an even head_dim and a factor in (0, 1]"
        )
    options.check_spark_rotation(rotated)
