"""The norms of a model by the part of a removal that makes them constant."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig
from normfree.modeling.blocks import PLACEMENTS, QKV_NORM_PLACEMENTS
from normfree.modeling.norms import SCALED_NORMS

BlockPart = Literal["ffn", "attention_qk", "attention_v", "ffn_output", "attention_output", "qk_norm", "v_norm"]
Part = Literal[BlockPart, "final", "end_of_text", "first_token", "massive_tokens"]
BLOCK_PARTS: tuple[BlockPart, ...] = get_args(BlockPart)
"""Norms in every block: before the feed-forward network; of what queries and keys, and values, read; of what a sublayer
writes, or of the stream after it; of queries and keys; of values."""
SPECIAL_PARTS: tuple[Part, ...] = ("end_of_text", "first_token", "massive_tokens")
"""Parts that are not norms but tokens, which lose their own std."""
QKNorms = Literal["keep", "remove"]
CENTERED_NORMS = ("layernorm", "layernorm_scaling")
NORMS_TO_REMOVE = ("layernorm", "rmsnorm", *SCALED_NORMS)
VALUES = 1
"""The values' place among the readers of attention's norm; queries and keys have place 0."""


class Reader(NamedTuple):
    """A norm by its name in the block, and the place of one of its stds."""

    norm: str
    place: int


def block_parts(config: NormfreeConfig, layer: int, qk_norms: QKNorms) -> dict[BlockPart, list[Reader]]:
    """The parts of block ``layer`` that a removal makes constant; QK-norms, an option of their own, only by request.

    The norms of queries, keys and values of the hybrid placements are of ``norm``, and always go.
    """
    parts: dict[BlockPart, list[Reader]] = {}
    if config.norm != "none":
        block = PLACEMENTS[config.norm_placement](config, layer)
        attention, ffn = block.around_attention, block.around_ffn
        if ffn.before is not None:
            parts["ffn"] = [Reader(ffn.before, 0)]
        if attention.before is not None:
            parts["attention_qk"] = [Reader(attention.before, 0)]
            parts["attention_v"] = [Reader(attention.before, VALUES)]
        written: tuple[tuple[BlockPart, str | None], ...] = (
            ("ffn_output", ffn.after or ffn.on_sum),
            ("attention_output", attention.after or attention.on_sum),
        )
        parts |= {part: [Reader(name, 0)] for part, name in written if name is not None}
    inside = config.head_norms if qk_norms == "remove" or config.qk_norm == "none" else {}
    if "q" in inside:
        parts["qk_norm"] = [Reader("attention.q_norm", 0), Reader("attention.k_norm", 0)]
    if "v" in inside:
        parts["v_norm"] = [Reader("attention.v_norm", 0)]
    return parts


def norms_to_remove(config: NormfreeConfig, qk_norms: QKNorms) -> list[tuple[Part, int | None]]:
    """All norms that a removal makes constant, as part and layer, a part at a time."""
    blocks = [block_parts(config, layer, qk_norms) for layer in range(config.n_layer)]
    parts: list[tuple[Part, int | None]] = [
        (part, layer) for part in BLOCK_PARTS for layer, block in enumerate(blocks) if part in block
    ]
    return parts if config.final_norm == "none" else [*parts, ("final", None)]


def parts_to_remove(config: NormfreeConfig, qk_norms: QKNorms) -> tuple[Part, ...]:
    """The kinds of norms that a removal makes constant."""
    return tuple(dict.fromkeys(part for part, _ in norms_to_remove(config, qk_norms)))


def check_removable(config: NormfreeConfig, qk_norms: QKNorms = "keep") -> None:
    """Checks that the norms of a model of that configuration can be removed.

    Raises:
        InputError: it has none, or one that is constant, of another kind, or whose place no weight can take over.
    """
    names = {"norm": config.norm, "final_norm": config.final_norm}
    if qk_norms == "remove" and config.qk_norm == "none":
        raise InputError("qk_norms is remove, and the model's qk_norm is none; leave it out")
    if not norms_to_remove(config, qk_norms):
        kept = f"; its qk_norm {config.qk_norm!r} goes with qk_norms: remove" if config.qk_norm != "none" else ""
        raise InputError(f"the model has no norm to remove: its norm and final_norm are none{kept}")
    if config.ffn == "spark":
        raise InputError(
            "norms cannot be removed before ffn 'spark': it reads the residual stream in two parts, whose weights "
            "cannot hold a norm of the whole; use a model with ffn dense or gated"
        )
    for option, name in names.items():
        if name not in (*NORMS_TO_REMOVE, "none"):
            raise InputError(f"{option} {name!r} cannot be removed; allowed: {', '.join(NORMS_TO_REMOVE)}, none")
    read_as_it_is = config.norm_placement in QKV_NORM_PLACEMENTS or (
        config.norm_placement == "mix" and config.final_norm not in CENTERED_NORMS
    )
    if config.norm in CENTERED_NORMS and read_as_it_is:
        raise InputError(
            f"norm {config.norm!r} of norm_placement {config.norm_placement!r} subtracts the mean of the residual "
            "stream, and what is written after it is read without a norm that does: no weight can hold that; RMSNorm "
            "can be removed"
        )
    if config.qk_norm_is_constant and qk_norms == "remove":
        raise InputError("qk_norms is remove, and the model's qk_norm is constant already; leave it out")
