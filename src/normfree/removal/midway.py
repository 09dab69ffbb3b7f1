"""A model during removal: its norms are replaced by removable ones, which a schedule makes constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.blocks import Block
from normfree.modeling.norms import SCALED_NORMS
from normfree.removal.fold import FOLDED
from normfree.removal.removable import MIDWAY, VALUES, RemovableNorm, SpecialTokens, Treatment
from normfree.removal.schedule import SPECIAL_PARTS, Part, Removal

NORMS_TO_REMOVE = ("layernorm", "rmsnorm")
READERS: dict[Part, tuple[str, int]] = {"ffn": ("ffn_norm", 0), "attention_qk": ("attention_norm", 0)}
READERS["attention_v"] = ("attention_norm", VALUES)
"""The norm of a block, and the reader's place in it, by part."""


class Midway:
    """``model`` with its norms replaced in place by removable ones with the same weights and function.

    Until the last removal its configuration's ``norm`` is a name that no model can be loaded with, so that an
    intermediate checkpoint cannot pass for a finished model.

    Raises:
        InputError: the model has no norms to remove, or not in pre placement.
    """

    def __init__(self, model: NormfreeForCausalLM, *, momentum: float, special_tokens: Treatment = "separate") -> None:
        check_removable(model.config)
        self.model = model
        self.original = {option: getattr(model.config, option) for option in ("norm", "final_norm")}
        eos = model.config.eos_token_id
        self.tokens = SpecialTokens([eos] if isinstance(eos, int) else eos, special_tokens)
        self.gone: list[Removal] = []
        self._momentum = momentum
        for block in model.model.blocks:
            assert isinstance(block, Block)
            block.attention_norm = self._removable(block.attention_norm, n_reader=2)
            block.ffn_norm = self._removable(block.ffn_norm, n_reader=1)
        model.model.final_norm = self._removable(model.model.final_norm, n_reader=1)
        model.config.norm = MIDWAY
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def apply(self, removal: Removal) -> None:
        """Makes a part constant, or ends the special treatment of some tokens.

        Raises:
            InputError: it was removed before, or its running std is not finite.
        """
        self.gone.append(removal)
        reader = self._reader(removal)
        if reader is not None:
            norm, place = reader
            norm.make_constant(place)
        elif removal.part == "end_of_text":
            self.tokens.end_of_text = None
        else:
            self.tokens.includes_first = False

    def has_finite_std(self, removal: Removal) -> bool:
        """True if the std of the removed part is finite; always true for special tokens."""
        reader = self._reader(removal)
        return reader is None or bool(reader[0].std[reader[1]].isfinite())

    def norms(self) -> Iterator[tuple[str, RemovableNorm]]:
        """The removable norms by module name, in the model's order."""
        for name, module in self.model.named_modules():
            if isinstance(module, RemovableNorm):
                yield name, module

    def finish(self) -> None:
        """Makes this a ``constant_std`` model in configuration and weights, after the last removal.

        Raises:
            InputError: a norm still divides by each token's own std, or special tokens still have their own.
        """
        left = [name for name, norm in self.norms() if not all(norm.is_constant)]
        if left or self.tokens.includes_first or self.tokens.end_of_text is not None:
            what = f"{len(left)} norms, {left[0]} first," if left else "special tokens"
            raise InputError(f"the removal is not finished: {what} still have stds of their own; let the run finish")
        self.forget_special_tokens()
        for option, norm in self.original.items():
            setattr(self.model.config, option, norm if norm == "none" else FOLDED)
        self.model.config.norm_is_centered = "rmsnorm" not in self.original.values()

    def forget_special_tokens(self) -> None:
        """Drops the stds of special tokens, which checkpoints after the last removal do not have."""
        for _, norm in self.norms():
            norm.forget_special_tokens()

    def _removable(self, norm: nn.Module, *, n_reader: int) -> nn.Module:
        if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
            return norm
        return RemovableNorm(norm, n_reader=n_reader, momentum=self._momentum, tokens=self.tokens)

    def _reader(self, removal: Removal) -> tuple[RemovableNorm, int] | None:
        """The norm that a removal makes constant, and the reader's place; None for special tokens."""
        if removal.part in SPECIAL_PARTS:
            return None
        name, reader = READERS.get(removal.part, ("final_norm", 0))
        norm = getattr(self.model.model if removal.layer is None else self.model.model.blocks[removal.layer], name)
        assert isinstance(norm, RemovableNorm), "schedules are checked against the model"
        return norm, reader

    def _see(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.tokens.see(options["input_ids"] if "input_ids" in options else args[0])


def check_removable(config: NormfreeConfig) -> None:
    """Checks that the norms of a model of that configuration can be removed.

    Raises:
        InputError: it has none, or one that is constant, of another kind, not in pre placement, or inside attention.
    """
    names = {"norm": config.norm, "final_norm": config.final_norm}
    if set(names.values()) == {"none"}:
        raise InputError("the model has no norm to remove: its norm and final_norm are none")
    if config.norm_placement != "pre":
        raise InputError(
            f"norms can be removed in pre placement, and the model's is {config.norm_placement!r}: there a norm acts "
            "on the residual stream or on what is added to it, not only on its readers"
        )
    if config.qk_norm != "none":
        raise InputError(
            f"qk_norm {config.qk_norm!r} cannot be removed: it divides each query and key by its own std; "
            "use a model without qk_norm"
        )
    if config.ffn == "spark":
        raise InputError(
            "norms cannot be removed before ffn 'spark': it reads the residual stream in two parts, whose weights "
            "cannot hold a norm of the whole; use a model with ffn dense or gated"
        )
    for option, name in names.items():
        if name not in (*NORMS_TO_REMOVE, "none"):
            hint = " (the constant 1/sqrt(layer) is not folded yet)" if name in SCALED_NORMS else ""
            raise InputError(f"{option} {name!r} cannot be removed{hint}; allowed: {', '.join(NORMS_TO_REMOVE)}, none")
    if len(set(names.values()) - {"none"}) > 1:
        raise InputError(
            f"norm {config.norm!r} and final_norm {config.final_norm!r} differ, but a model with constant stds centres "
            "everywhere or nowhere; only equal ones can be removed"
        )
