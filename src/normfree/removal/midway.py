"""A model during removal: its norms are replaced by removable ones, which a schedule makes constant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.qk_norms import PerHeadLayerNorm
from normfree.removal.fold import FOLDED
from normfree.removal.parts import CENTERED_NORMS, Part, block_parts, check_removable
from normfree.removal.removable import MIDWAY, RemovableHeadNorm, RemovableNorm, SpecialTokens
from normfree.removal.schedule import Removal, RemovalSchedule


class Midway:
    """``model`` with its norms replaced in place by removable ones with the same weights and function.

    Until the last removal is over its configuration's ``norm`` is a name that no model can be loaded with, so that an
    intermediate checkpoint cannot pass for a finished model.

    step: the optimizer step that is being taken (:meth:`begin_step`).

    Raises:
        InputError: the model has no norms to remove, or of a kind that cannot be.
    """

    def __init__(self, model: NormfreeForCausalLM, schedule: RemovalSchedule) -> None:
        config = model.config
        check_removable(config, schedule.qk_norms)
        self.model = model
        self.schedule = schedule
        self.step = 0
        self.original = {option: getattr(config, option) for option in ("norm", "final_norm")}
        eos = config.eos_token_id
        self.tokens = SpecialTokens(
            [eos] if isinstance(eos, int) else eos, schedule.special_tokens, factor=schedule.special_factor
        )
        self.gone: list[Removal] = []
        self._readers: dict[tuple[Part, int | None], list[tuple[RemovableNorm, int]]] = {}
        for layer in range(config.n_layer):
            parts = block_parts(config, layer, schedule.qk_norms)
            n_reader = Counter(reader.norm for readers in parts.values() for reader in readers)
            norms = {norm: self._made_removable(f"blocks.{layer}.{norm}", n) for norm, n in n_reader.items()}
            for part, readers in parts.items():
                self._readers[part, layer] = [(norms[norm], place) for norm, place in readers]
        if config.final_norm != "none":
            self._readers["final", None] = [(self._made_removable("final_norm", 1), 0)]
        config.norm = MIDWAY
        self._hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def apply(self, removal: Removal) -> None:
        """Makes a part constant, or ends the special treatment of some tokens; in steps, if the schedule has a ramp.

        Raises:
            InputError: it was removed before, or no batch has been seen yet.
        """
        self.gone.append(removal)
        for norm, place in self._readers_of(removal):
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
    def aside(self) -> Iterator[None]:
        """Forward passes in training mode leave running and largest stds as they are."""
        norms = [norm for _, norm in self.norms()]
        try:
            for norm in norms:
                norm.is_aside = True
            yield
        finally:
            for norm in norms:
                norm.is_aside = False

    @contextmanager
    def alone(self, removal: Removal) -> Iterator[float]:
        """Only this part divides by its constant, which is yielded; the mean of several."""
        readers = self._readers_of(removal)
        assert readers, "special tokens are no norm"
        try:
            for norm, place in readers:
                norm.make_constant(place)
            yield float(torch.cat([norm.std[place].flatten() for norm, place in readers]).mean())
        finally:
            for norm, place in readers:
                norm.is_constant[place] = False

    def unobserved_decoder(self) -> nn.Module:
        """The decoder with its own modules, but the same weights, norms and configuration: no probe sees its passes."""
        shared = [
            *self.model.parameters(),
            *self.model.buffers(),
            self.model.config,
            *(norm for _, norm in self.norms()),
        ]
        return deepcopy(self.model.model, {id(each): each for each in shared})

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
        config, norm, final = self.model.config, self.original["norm"], self.original["final_norm"]
        config.norm, config.final_norm = (each if each == "none" else FOLDED for each in (norm, final))
        config.final_norm_is_centered = None if final == "none" else final in CENTERED_NORMS
        config.norm_is_centered = (
            norm in CENTERED_NORMS if norm != "none" else config.final_norm_is_centered is not False
        )
        config.qk_norm_is_constant = config.qk_norm_is_constant or self.schedule.qk_norms == "remove"

    def forget_special_tokens(self) -> None:
        """Drops the stds of special tokens, which checkpoints after the last removal do not have."""
        for _, norm in self.norms():
            norm.forget_special_tokens()

    def _made_removable(self, name: str, n_reader: int) -> RemovableNorm:
        """Replaces the norm ``name`` of the decoder."""
        parent, _, child = name.rpartition(".")
        holder, schedule = self.model.model.get_submodule(parent), self.schedule
        norm = getattr(holder, child)
        assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm, PerHeadLayerNorm)), "the configuration is checked"
        build: Any = partial(RemovableNorm, n_reader=n_reader)
        if parent.endswith(".attention"):
            config = self.model.config
            build = partial(RemovableHeadNorm, n_head=config.n_head if child == "q_norm" else config.n_kv_head)
        removable: RemovableNorm = build(
            norm, tokens=self.tokens, momentum=schedule.std_momentum, statistic=schedule.std_statistic
        )
        setattr(holder, child, removable)
        return removable

    def _follow_ramp(self, removal: Removal) -> None:
        n_step = self.schedule.ramp_of(removal.part)
        done = min(1.0, (self.step - removal.step + 1) / n_step) if n_step else 1.0
        for norm, place in self._readers_of(removal):
            norm.ramp[place] = done
        if self.tokens.shares.get(removal.part):
            self.tokens.shares[removal.part] = 1 - done

    def _readers_of(self, removal: Removal) -> list[tuple[RemovableNorm, int]]:
        """The norms that a removal makes constant, and the reader's place in each; none for special tokens."""
        return self._readers.get((removal.part, removal.layer), [])

    def _see(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.tokens.see(options["input_ids"] if "input_ids" in options else args[0])


def norm_name(module: str) -> str:
    """A norm as messages call it, from its module's name: ``the attention norm of layer 3``."""
    names = module.split(".")
    kind = names[-1].removesuffix("_norm").replace("_", " ")
    layer = next((name for name in names if name.isdigit()), None)
    return f"the {kind} norm" if layer is None else f"the {kind} norm of layer {layer}"
