"""Direct logit attribution: what each component adds to a logit through the residual stream, and with what error.

The final residual stream is the sum of what the embedding, the heads and the MLPs write into it. If the readout were
linear, logits would be such a sum too; but a final norm divides by a std that depends on every component. Attribution
freezes that std, and ``direct_attribution_errors`` measures the error this makes ("Transformers Don't Need LayerNorm at
Inference Time", 2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch

from normfree.errors import InputError
from normfree.interpret.decoder_parts import (
    check_decoder,
    check_tokens,
    head_projections,
    neuron_projections,
    read_inputs,
    readers_of_residual_stream,
)
from normfree.interpret.readout import Readout
from normfree.modeling import NormfreeForCausalLM
from normfree.progress import track

ERRORS = ["nmae", "mean_absolute_error", "mean_absolute_effect"]


@dataclass(frozen=True)
class LogitAttribution:
    """Logits (or differences of two) as a sum over components: ``logits`` = Σ ``contributions`` + ``constant``.

    The sum is exact, up to the rounding of the forward pass, if each token's own std was frozen.

    components:
        a row a component, in the order of ``contributions``: kind (embedding, head, attention_bias, mlp, neuron,
        mlp_bias), layer and index (of the head or neuron), NA where there is none.
    contributions: float32 [n_component, batch, T].
    constant: from the biases of final norm and unembedding, float32 [batch, T].
    logits: of the model, float32 [batch, T].
    """

    components: pd.DataFrame
    contributions: torch.Tensor
    constant: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class DirectAttributionErrors:
    """The result of :func:`direct_attribution_errors`: a row a head, and a row an MLP.

    Both have layer, nmae, mean_absolute_error and mean_absolute_effect (logits); ``heads`` also head. ``nmae`` is the
    quotient of the two means, NaN for a component without effect.
    """

    heads: pd.DataFrame
    mlps: pd.DataFrame


@torch.no_grad()
def direct_logit_attribution(
    model: NormfreeForCausalLM,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    against: torch.Tensor | None = None,
    *,
    constant_std: float | None = None,
    neurons: bool = False,
) -> LogitAttribution:
    """The contribution of every component to the logit of a token at each position. One pass, float64 inside.

    A component that writes c into the residual stream adds W_target · (g ⊙ C c) / σ to the logit of a target (see
    :class:`~normfree.interpret.readout.Readout`), with σ frozen.

    Args:
        model: a pre-norm decoder in evaluation mode.
        input_ids: int64 [batch, T], no padding; one batch, kept in memory as a whole.
        targets: the tokens whose logits are attributed, int64 [batch, T].
        against: attribute the logits of ``targets`` less those of these tokens, int64 [batch, T].
        constant_std: freeze σ to this number for all tokens (see :func:`mean_final_std`) instead of each token's own;
            the sum over components is then an approximation. Only for a final norm with a std of its own.
        neurons: neurons and output bias of each MLP instead of the MLP as a whole.

    Raises:
        InputError: the model is of another kind (see the arguments), or the tokens do not fit it or one another.
    """
    check_decoder(model)
    readout = Readout.of(model)
    _check_constant_std(readout, constant_std)
    targets, against = _checked(model, input_ids, targets, against)
    written, final = _written(model, input_ids, neurons)
    return LogitAttribution(
        _components(written),
        _contributions(readout, written, final, targets, against, constant_std).float().cpu(),
        readout.constants(targets, against).float().cpu(),
        readout.logits(final, targets, against).float().cpu(),
    )


@torch.no_grad()
def direct_effects(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None = None
) -> torch.Tensor:
    """The measured direct effect of every component: the logit less the logit without the component's output.

    The output is subtracted from the final residual stream only, and the final norm is applied as it is. Arguments and
    errors as in :func:`direct_logit_attribution`.

    Returns:
        float32 [n_component, batch, T], in the order of :func:`direct_logit_attribution` without ``neurons``.
    """
    check_decoder(model)
    targets, against = _checked(model, input_ids, targets, against)
    return _effects(Readout.of(model), *_written(model, input_ids), targets, against).float().cpu()


@torch.no_grad()
def direct_attribution_errors(
    model: NormfreeForCausalLM, sequences: torch.Tensor, *, constant_std: float | None = None, batch_size: int = 8
) -> DirectAttributionErrors:
    """The error of attribution against the measured direct effect, on the logits of the next tokens of ``sequences``.

    The normalized mean absolute error of a component is mean |attribution − effect| / mean |effect| over all predicted
    tokens: 0, up to rounding, in a model whose final norm has no std of its own.

    Args:
        model: a pre-norm decoder in evaluation mode.
        sequences: int64 [n, T], T at least 2, no padding.
        constant_std: as in :func:`direct_logit_attribution`.
        batch_size: sequences a pass.

    Raises:
        InputError: as :func:`direct_logit_attribution`.
    """
    check_decoder(model)
    check_predicting(model, sequences)
    readout = Readout.of(model)
    _check_constant_std(readout, constant_std)
    n_predicted = sequences.shape[0] * (sequences.shape[1] - 1)
    sums, components = [], pd.DataFrame()
    for batch in track(sequences.to(model.device).split(batch_size), "direct logit attribution", unit="batches"):
        targets = batch[:, 1:]
        written, final = _written(model, batch[:, :-1])
        attributed = _contributions(readout, written, final, targets, None, constant_std)
        measured = _effects(readout, written, final, targets, None)
        sums.append(torch.stack([attributed - measured, measured]).abs().sum(dim=(2, 3)).cpu())
        components = _components(written)
    error, effect = torch.stack(sums).sum(dim=0) / n_predicted
    values = (error / effect, error, effect)
    table = components.assign(**{name: each.numpy() for name, each in zip(ERRORS, values, strict=True)})
    heads = table[table["kind"] == "head"].rename(columns={"index": "head"}).astype({"layer": int, "head": int})
    mlps = table[table["kind"] == "mlp"].astype({"layer": int})
    return DirectAttributionErrors(
        heads[["layer", "head", *ERRORS]].reset_index(drop=True), mlps[["layer", *ERRORS]].reset_index(drop=True)
    )


@torch.no_grad()
def mean_final_std(model: NormfreeForCausalLM, sequences: torch.Tensor, batch_size: int = 8) -> float:
    """The mean σ of the final norm over the tokens of ``sequences`` (int64 [n, T], T at least 2) after the first.

    The first token is left out: in trained models its σ is many times that of the others, which is why norm removal
    treats it separately.

    Raises:
        InputError: as :func:`direct_logit_attribution`; also for a final norm without a std of its own.
    """
    check_decoder(model)
    check_predicting(model, sequences)
    readout = Readout.of(model)
    _check_constant_std(readout, 1.0)
    finals = (read_inputs(model, batch, [model.model.final_norm])[0] for batch in sequences.split(batch_size))
    return torch.cat([readout.std(final)[:, 1:].cpu() for final in finals]).mean().item()


def check_predicting(model: NormfreeForCausalLM, sequences: torch.Tensor) -> None:
    """Checks that ``sequences`` are token ids of ``model``, int64 [n, T] with T at least 2.

    Raises:
        InputError: they are not.
    """
    check_tokens(model, sequences, "sequences", (None, None))
    if sequences.shape[1] < 2:
        raise InputError("sequences of one token predict nothing; give sequences of at least 2 tokens")


def _check_constant_std(readout: Readout, constant_std: float | None) -> None:
    if constant_std is None:
        return
    if readout.is_linear:
        raise InputError("the model's final norm has no std of its own to freeze; leave the constant std out")
    if not 0 < constant_std < float("inf"):
        raise InputError(f"the constant std is {constant_std}; it must be positive and finite")


def _checked(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``targets`` and ``against`` on the model's device."""
    check_tokens(model, input_ids, "input_ids", (None, None))
    check_tokens(model, targets, "targets", tuple(input_ids.shape))
    if against is not None:
        check_tokens(model, against, "against", tuple(input_ids.shape))
        against = against.to(model.device)
    return targets.to(model.device), against


class _Written(NamedTuple):
    """What a module writes into the residual stream in one pass: x Wᵀ, a component for each part of the channels of x.

    parts: the components' kind, and their number.
    x: [batch, T, k]; k is a multiple of the number of parts.
    weight: W [n_embd, k]; None for the identity.
    bias: [n_embd], a component of the kind ``bias_kind``, or, where that is None, part of the only one.
    """

    parts: tuple[str, int]
    layer: int | None
    x: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bias_kind: str | None = None


def _written(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, neurons: bool = False
) -> tuple[list[_Written], torch.Tensor]:
    """What each module writes in one pass over ``input_ids`` [batch, T], and the final residual stream."""
    n_layer, n_head, n_inner = model.config.n_layer, model.config.n_head, model.config.n_inner
    first, *_, last = readers_of_residual_stream(model)
    attentions, mlps = head_projections(model), neuron_projections(model)
    embedding, *inputs, final = read_inputs(model, input_ids, [first, *attentions, *mlps, last])
    written = [_Written(("embedding", 1), None, embedding)]
    for layer, (o_proj, down_proj) in enumerate(zip(attentions, mlps, strict=True)):
        heads, activations = inputs[layer], inputs[n_layer + layer]
        written.append(_Written(("head", n_head), layer, heads, o_proj.weight, o_proj.bias, "attention_bias"))
        mlp, bias_kind = (("neuron", n_inner), "mlp_bias") if neurons else (("mlp", 1), None)
        written.append(_Written(mlp, layer, activations, down_proj.weight, down_proj.bias, bias_kind))
    return written, final


def _components(written: Sequence[_Written]) -> pd.DataFrame:
    rows: list[tuple[str, int | None, int | None]] = []
    for each in written:
        kind, n = each.parts
        rows += [(kind, each.layer, part if kind in ("head", "neuron") else None) for part in range(n)]
        if each.bias is not None and each.bias_kind is not None:
            rows.append((each.bias_kind, each.layer, None))
    frame = pd.DataFrame(rows, columns=["kind", "layer", "index"])
    return frame.astype({"layer": "Int64", "index": "Int64"})


def _contributions(
    readout: Readout,
    written: Sequence[_Written],
    final: torch.Tensor,
    targets: torch.Tensor,
    against: torch.Tensor | None,
    constant_std: float | None,
) -> torch.Tensor:
    """Float64 [n_component, batch, T], in the order of :func:`_components`."""
    std = readout.std(final) if constant_std is None else constant_std
    direction = readout.directions(targets, against) / std
    found = []
    for each in written:
        # Reading the direction back through W keeps [batch, T, n_inner, n_embd] from being built.
        read = direction if each.weight is None else direction @ each.weight.double()
        parts = (each.x.double() * read).unflatten(-1, (each.parts[1], -1)).sum(dim=-1).movedim(-1, 0)
        if each.bias is not None:
            bias = (direction @ each.bias.double())[None]
            parts = parts + bias if each.bias_kind is None else torch.cat([parts, bias])
        found.append(parts)
    return torch.cat(found)


def _effects(
    readout: Readout,
    written: Sequence[_Written],
    final: torch.Tensor,
    targets: torch.Tensor,
    against: torch.Tensor | None,
) -> torch.Tensor:
    """Float64 [n_component, batch, T], in the order of :func:`_components`."""
    final = final.double()
    logits = readout.logits(final, targets, against)
    return torch.stack([logits - readout.logits(final - each, targets, against) for each in _outputs(written)])


def _outputs(written: Sequence[_Written]) -> Iterator[torch.Tensor]:
    """The output of each component, one at a time: float64 [batch, T, n_embd]."""
    for each in written:
        x, n = each.x.double(), each.parts[1]
        if each.weight is None:
            yield x
            continue
        for part, weight in zip(x.chunk(n, dim=-1), each.weight.double().chunk(n, dim=1), strict=True):
            output = part @ weight.T
            yield output if each.bias is None or each.bias_kind else output + each.bias.double()
        if each.bias is not None and each.bias_kind:
            yield each.bias.double().expand(*x.shape[:-1], -1)
