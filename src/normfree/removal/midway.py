"""A model during removal: its norms are replaced by removable ones, which a schedule makes constant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.blocks import Block
from normfree.modeling.norms import SCALED_NORMS
from normfree.removal.fold import FOLDED
from normfree.removal.removable import MIDWAY, VALUES, RemovableNorm, SpecialTokens
from normfree.removal.schedule import SPECIAL_PARTS, Part, Removal, RemovalSchedule

NORMS_TO_REMOVE = ("layernorm", "rmsnorm")
READERS: dict[Part, tuple[str, int]] = {"ffn": ("ffn_norm", 0), "attention_qk": ("attention_norm", 0)}
READERS["attention_v"] = ("attention_norm", VALUES)
"""The norm of a block, and the reader's place in it, by part."""


class Midway:
    """``model`` with its norms replaced in place by removable ones with the same weights and function.

    Until the last removal is over its configuration's ``norm`` is a name that no model can be loaded with, so that an
    intermediate checkpoint cannot pass for a finished model.

    step: the optimizer step that is being taken (:meth:`begin_step`).

    Raises:
        InputError: the model has no norms to remove, or not in pre placement.
    """

    def __init__(self, model: NormfreeForCausalLM, schedule: RemovalSchedule) -> None:
        check_removable(model.config)
        self.model = model
        self.schedule = schedule
        self.step = 0
        self.original = {option: getattr(model.config, option) for option in ("norm", "final_norm")}
        eos = model.config.eos_token_id
        self.tokens = SpecialTokens(
            [eos] if isinstance(eos, int) else eos, schedule.special_tokens, factor=schedule.special_factor
        )
        self.gone: list[Removal] = []
        for block in model.model.blocks:
            assert isinstance(block, Block)
            block.attention_norm = self._removable(block.attention_norm, n_reader=2)
            block.ffn_norm = self._removable(block.ffn_norm, n_reader=1)
        model.model.final_norm = self._removable(model.model.final_norm, n_reader=1)
        model.config.norm = MIDWAY
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def apply(self, removal: Removal) -> None:
        """Makes a part constant, or ends the special treatment of some tokens; in steps, if the schedule has a ramp.

        Raises:
            InputError: it was removed before, or no batch has been seen yet.
        """
        self.gone.append(removal)
        reader = self._reader(removal)
        if reader is not None:
            norm, place = reader
            norm.make_constant(place)
        self._follow_ramp(removal)

    def begin_step(self, step: int) -> None:
        """Takes the ramps of what is gone to ``step``, and forgets the largest stds of the step before."""
        self.step = step
        for removal in self.gone:
            self._follow_ramp(removal)
        for _, norm in self.norms():
            norm.begin_step()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Forward passes set the running stds, in evaluation mode too."""
        for _, norm in self.norms():
            norm.is_measuring = True
        yield
        for _, norm in self.norms():
            norm.is_measuring = False

    @contextmanager
    def alone(self, removal: Removal) -> Iterator[float]:
        """Only this norm's reader divides by its constant, which is yielded."""
        reader = self._reader(removal)
        assert reader is not None, "special tokens are no norm"
        norm, place = reader
        norm.make_constant(place)
        yield float(norm.std[place])
        norm.is_constant[place] = False

    def overflow(self) -> str | None:
        """The first norm, in the model's order, before which a std of this step was not finite; None if all were."""
        largest = {name: norm.largest for name, norm in self.norms() if norm.largest is not None}
        if not largest:
            return None
        is_finite = torch.stack(list(largest.values())).isfinite().tolist()
        return next((norm_name(name) for name, good in zip(largest, is_finite, strict=True) if not good), None)

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
        left = [name for name, norm in self.norms() if not all(norm.is_constant) or min(norm.ramp) < 1]
        if left or self.tokens.has_any:
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
        return RemovableNorm(
            norm,
            n_reader=n_reader,
            tokens=self.tokens,
            momentum=self.schedule.std_momentum,
            statistic=self.schedule.std_statistic,
        )

    def _follow_ramp(self, removal: Removal) -> None:
        n_step = self.schedule.ramp_steps
        done = min(1.0, (self.step - removal.step + 1) / n_step) if n_step else 1.0
        reader = self._reader(removal)
        if reader is not None:
            norm, place = reader
            norm.ramp[place] = done
        elif self.tokens.shares[removal.part]:
            self.tokens.shares[removal.part] = 1 - done

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


def norm_name(module: str) -> str:
    """A norm as messages call it, from its module's name: ``the attention norm of layer 3``."""
    *_, layer, name = module.split(".")
    kind = name.removesuffix("_norm")
    return f"the {kind} norm of layer {layer}" if layer.isdigit() else f"the {kind} norm"


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
