"""Activation patching and its linear approximation, attribution patching, on pairs of clean and corrupted prompts.

Activation patching copies an activation of the clean run into the corrupted run and measures the answer's logit;
attribution patching estimates that for all activations at once from one gradient (Nanda, "Attribution Patching", 2023;
Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery", 2023, Eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from normfree.errors import InputError
from normfree.interpret.decoder_parts import (
    check_decoder,
    check_tokens,
    head_projections,
    intercepted,
    read_inputs,
    readers_of_residual_stream,
    starting_at,
)
from normfree.modeling import NormfreeForCausalLM
from normfree.progress import track


@dataclass(frozen=True)
class PromptPairs:
    """Pairs of prompts that differ in what the answer depends on.

    clean, corrupted: int64 [n, T], no padding.
    answers, wrong_answers: the token that should follow the clean prompt, and the one it is compared with, int64 [n].
    """

    clean: torch.Tensor
    corrupted: torch.Tensor
    answers: torch.Tensor
    wrong_answers: torch.Tensor

    def split(self, batch_size: int) -> list[PromptPairs]:
        """The pairs in batches of ``batch_size``."""
        parts = (each.split(batch_size) for each in vars(self).values())
        return [PromptPairs(*batch) for batch in zip(*parts, strict=True)]

    def to(self, device: torch.device) -> PromptPairs:
        """The pairs on ``device``."""
        return PromptPairs(*(each.to(device) for each in vars(self).values()))


@dataclass(frozen=True)
class PatchingAgreement:
    """How well attribution patching approximates activation patching, over ``n`` patches.

    pearson: their correlation; NaN if one of them is constant.
    nmae: mean |attribution − activation| / mean |activation|.
    """

    pearson: float
    nmae: float
    n: int


@torch.no_grad()
def logit_difference(model: NormfreeForCausalLM, pairs: PromptPairs, *, corrupted: bool = False) -> torch.Tensor:
    """The answer's logit minus the wrong answer's after each clean (or corrupted) prompt: float64 [n].

    Raises:
        InputError: the pairs do not fit the model or one another.
    """
    _check(model, pairs)
    return _metric(model, pairs.corrupted if corrupted else pairs.clean, pairs.to(model.device)).cpu()


def patch_heads(
    model: NormfreeForCausalLM, pairs: PromptPairs, *, by_position: bool = False, batch_size: int = 32
) -> pd.DataFrame:
    """Both patchings of the output of every attention head, before ``o_proj``, at all positions at once or at each.

    An effect is the change of :func:`logit_difference` from the corrupted run, in logits: measured with the clean
    output in its place (half a pass a head and, by position, a position), and estimated as Σ (clean − corrupted) ·
    gradient at the corrupted run (one backward pass).

    Args:
        model: a pre-norm decoder in evaluation mode; the ``.grad`` of its weights is not changed.
        pairs: at least one.
        by_position: patch one position at a time.
        batch_size: pairs a pass.

    Returns:
        pair, layer, head, position (only ``by_position``), activation_patching, attribution_patching; a row a patch.

    Raises:
        InputError: the model is of another kind, or the pairs do not fit it or one another.
    """
    _check(model, pairs)
    patches = _patch(model, pairs, head_projections(model), model.config.n_head, by_position, batch_size)
    return patches if by_position else patches.drop(columns="position")


def patch_residual_stream(model: NormfreeForCausalLM, pairs: PromptPairs, *, batch_size: int = 32) -> pd.DataFrame:
    """Both patchings of the residual stream after every block, one position at a time; see :func:`patch_heads`.

    Returns:
        pair, layer (the stream after its block), position, activation_patching, attribution_patching; a row a patch.

    Raises:
        InputError: as :func:`patch_heads`.
    """
    _check(model, pairs)
    modules = readers_of_residual_stream(model)[1:]
    return _patch(model, pairs, modules, 1, by_position=True, batch_size=batch_size).drop(columns="head")


def agreement(patches: pd.DataFrame) -> PatchingAgreement:
    """Correlation and error of attribution patching over the rows of ``patches``.

    Args:
        patches: activation_patching and attribution_patching; NaN in either makes both numbers NaN.

    Raises:
        InputError: there are fewer than two rows.
    """
    if len(patches) < 2:
        raise InputError(f"agreement needs at least 2 patches, got {len(patches)}")
    activation = patches["activation_patching"].to_numpy(dtype=np.float64)
    attribution = patches["attribution_patching"].to_numpy(dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.corrcoef(activation, attribution)[0, 1]
        nmae = np.abs(attribution - activation).mean() / np.abs(activation).mean()
    return PatchingAgreement(float(pearson), float(nmae), len(patches))


def _check(model: NormfreeForCausalLM, pairs: PromptPairs) -> None:
    check_decoder(model)
    check_tokens(model, pairs.clean, "clean prompts", (None, None))
    check_tokens(model, pairs.corrupted, "corrupted prompts", tuple(pairs.clean.shape))
    check_tokens(model, pairs.answers, "answers", (len(pairs.clean),))
    check_tokens(model, pairs.wrong_answers, "wrong answers", (len(pairs.clean),))


def _metric(model: NormfreeForCausalLM, input_ids: torch.Tensor, pairs: PromptPairs) -> torch.Tensor:
    output = model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    logits = output.logits[:, -1].double()
    chosen = logits.gather(1, torch.stack([pairs.answers, pairs.wrong_answers], dim=1))
    return chosen[:, 0] - chosen[:, 1]


def _patch(
    model: NormfreeForCausalLM,
    pairs: PromptPairs,
    modules: Sequence[nn.Module],
    n_head: int,
    by_position: bool,
    batch_size: int,
) -> pd.DataFrame:
    """Both patchings of the inputs of ``modules``, one a layer, whose channels are those of ``n_head`` heads."""
    results = []
    for batch in track(pairs.split(batch_size), "patching", unit="batches"):
        each = batch.to(model.device)
        with torch.no_grad():
            clean = read_inputs(model, each.clean, modules)
            streams = read_inputs(model, each.corrupted, readers_of_residual_stream(model)[:-1])
        corrupted_metric, attribution = _attribution(model, each, modules, clean, n_head)
        if not by_position:
            attribution = attribution.sum(dim=-1, keepdim=True)
        activation = torch.empty_like(attribution)
        for layer, head, position in np.ndindex(*attribution.shape[1:]):
            where = (slice(None), slice(position, position + 1) if by_position else slice(None), head)
            with starting_at(model, layer, streams[layer]):
                patched = _patched_metric(model, each, modules[layer], clean[layer].unflatten(-1, (n_head, -1)), where)
            activation[:, layer, head, position] = patched - corrupted_metric
        results.append(torch.stack([activation, attribution]).cpu())
    effects = torch.cat(results, dim=1).numpy()
    indices = zip(("pair", "layer", "head", "position"), np.indices(effects.shape[1:]), strict=True)
    values = zip(("activation_patching", "attribution_patching"), effects, strict=True)
    return pd.DataFrame({name: each.ravel() for name, each in (*indices, *values)})


def _attribution(
    model: NormfreeForCausalLM, pairs: PromptPairs, modules: Sequence[nn.Module], clean: list[torch.Tensor], n_head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric of the corrupted runs [n], and (clean − corrupted) · its gradient, float64 [n, n_layer, n_head, T]."""
    corrupted: dict[int, torch.Tensor] = {}

    def keep(place: int, x: torch.Tensor) -> torch.Tensor:
        # With frozen weights x needs no gradient yet, and so nothing before it does.
        corrupted[place] = x if x.requires_grad else x.detach().requires_grad_()
        return corrupted[place]

    with torch.enable_grad(), intercepted(modules, keep):
        metric = _metric(model, pairs.corrupted, pairs)
        gradients = torch.autograd.grad(metric.sum(), [corrupted[place] for place in range(len(modules))])
    attributions = [
        ((each.double() - corrupted[place].double()) * gradient.double()).unflatten(-1, (n_head, -1)).sum(dim=-1)
        for place, (each, gradient) in enumerate(zip(clean, gradients, strict=True))
    ]
    return metric.detach(), torch.stack(attributions, dim=1).transpose(2, 3).detach()


@torch.no_grad()
def _patched_metric(
    model: NormfreeForCausalLM,
    pairs: PromptPairs,
    module: nn.Module,
    clean: torch.Tensor,
    where: tuple[slice, slice, int],
) -> torch.Tensor:
    """The metric of the corrupted runs with ``clean`` [n, T, n_head, head_dim] copied in at ``where``."""

    def replace(_: int, x: torch.Tensor) -> torch.Tensor:
        patched = x.clone()
        patched.view(clean.shape)[where] = clean[where]
        return patched

    with intercepted([module], replace):
        return _metric(model, pairs.corrupted, pairs)
