"""Direct logit attribution: what each component adds to a logit along the residual stream, and how true that is.

The final residual stream is the sum of what the embedding, the heads and the MLPs write into it. Were the readout
linear, so would be the logit; a final norm divides by a std that depends on all of them. Attribution holds that std
fixed, and ``direct_attribution_errors`` says what this costs ("Transformers Don't Need LayerNorm at Inference Time",
2025, on direct logit attribution).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

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

EMBEDDING, HEAD, ATTENTION_BIAS, MLP, NEURON, MLP_BIAS = (
    "embedding",
    "head",
    "attention_bias",
    "mlp",
    "neuron",
    "mlp_bias",
)
"""The kinds of components. ``mlp`` is a whole feed-forward network, its output bias included."""


@dataclass(frozen=True)
class LogitAttribution:
    """Logits (or differences of two) as a sum over components: ``logits`` = Σ ``contributions`` + ``constant``.

    The sum holds where stds are frozen to each token's own, up to the rounding of the model's forward pass.

    components:
        a row a component, in the order of ``contributions``: kind (embedding, head, attention_bias, mlp, neuron,
        mlp_bias), layer and index (of the head or neuron), NA where there is none.
    contributions: float32 [n_component, batch, T].
    constant: what the biases of final norm and unembedding add, float32 [batch, T].
    logits: of the model, float32 [batch, T].
    """

    components: pd.DataFrame
    contributions: torch.Tensor
    constant: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class DirectAttributionErrors:
    """What :func:`direct_attribution_errors` found: a row a head, and a row an MLP.

    Both have layer, nmae, mean_absolute_error and mean_absolute_effect (logits); ``heads`` also head. ``nmae`` is the
    quotient of the two means, NaN for a component without effect.
    """

    heads: pd.DataFrame
    mlps: pd.DataFrame


@dataclass(frozen=True)
class _Written:
    """What one pass wrote: embedding and final residual stream [batch, T, n_embd]; per layer, what o_proj and
    down_proj read.
    """

    embedding: torch.Tensor
    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]
    final: torch.Tensor


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
            the sum over components is then an approximation. Only for a model whose final norm has a std of its own.
        neurons: neurons and output bias of each MLP instead of the MLP as a whole.

    Raises:
        InputError: the model is of another kind (see the arguments), or tokens do not fit it or one another.
    """
    check_decoder(model)
    readout = Readout.of(model)
    _check_constant_std(readout, constant_std)
    targets, against = _checked(model, input_ids, targets, against)
    written = _read(model, input_ids)
    return LogitAttribution(
        _components(model, neurons),
        _contributions(model, readout, written, targets, against, constant_std, neurons).float().cpu(),
        readout.constants(targets, against).float().cpu(),
        readout.logits(written.final, targets, against).float().cpu(),
    )


@torch.no_grad()
def direct_effects(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None = None
) -> torch.Tensor:
    """The direct effect of every component, measured: its logit less that without what the component writes.

    The component's output is subtracted from the final residual stream only, and the final norm is applied as it is.
    Arguments and errors as in :func:`direct_logit_attribution`.

    Returns:
        float32 [n_component, batch, T], the components as :func:`direct_logit_attribution` has them without
        ``neurons``.
    """
    check_decoder(model)
    targets, against = _checked(model, input_ids, targets, against)
    return _effects(model, Readout.of(model), _read(model, input_ids), targets, against).float().cpu()


@torch.no_grad()
def direct_attribution_errors(
    model: NormfreeForCausalLM, sequences: torch.Tensor, *, constant_std: float | None = None, batch_size: int = 8
) -> DirectAttributionErrors:
    """How far attribution is from the measured direct effect, on the logits of the next tokens of ``sequences``.

    The normalized mean absolute error of a component is mean |attribution − effect| / mean |effect|, over all
    predicted tokens. It is 0 in a model whose final norm has no std of its own, up to rounding.

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
    components = _components(model, neurons=False)
    error = torch.zeros(len(components), dtype=torch.float64)
    effect = torch.zeros(len(components), dtype=torch.float64)
    for batch in track(sequences.to(model.device).split(batch_size), "direct logit attribution", unit="batches"):
        input_ids, targets = batch[:, :-1], batch[:, 1:]
        written = _read(model, input_ids)
        attributed = _contributions(model, readout, written, targets, None, constant_std, neurons=False)
        measured = _effects(model, readout, written, targets, None)
        error += (attributed - measured).abs().sum(dim=(1, 2)).cpu()
        effect += measured.abs().sum(dim=(1, 2)).cpu()
    n_predicted = sequences.shape[0] * (sequences.shape[1] - 1)
    table = components.assign(
        nmae=(error / effect).numpy(),
        mean_absolute_error=(error / n_predicted).numpy(),
        mean_absolute_effect=(effect / n_predicted).numpy(),
    )
    columns = ["nmae", "mean_absolute_error", "mean_absolute_effect"]
    heads = table[table["kind"] == HEAD].rename(columns={"index": "head"}).astype({"layer": int, "head": int})
    mlps = table[table["kind"] == MLP].astype({"layer": int})
    return DirectAttributionErrors(
        heads[["layer", "head", *columns]].reset_index(drop=True), mlps[["layer", *columns]].reset_index(drop=True)
    )


@torch.no_grad()
def mean_final_std(model: NormfreeForCausalLM, sequences: torch.Tensor, batch_size: int = 8) -> float:
    """The mean σ of the final norm over the tokens of ``sequences`` (int64 [n, T], T at least 2) after the first.

    The first token is left out: in trained models its σ is many times that of the others, and the removal of norms
    treats it apart for that reason.

    Raises:
        InputError: as :func:`direct_logit_attribution`; also for a model whose final norm has no std of its own.
    """
    check_decoder(model)
    check_predicting(model, sequences)
    readout = Readout.of(model)
    _check_constant_std(readout, 1.0)
    stds = []
    for batch in sequences.split(batch_size):
        (final,) = read_inputs(model, batch, [model.model.final_norm])
        stds.append(readout.std(final)[:, 1:].cpu())
    return torch.cat(stds).mean().item()


def check_predicting(model: NormfreeForCausalLM, sequences: torch.Tensor) -> None:
    """Checks that ``sequences`` are token ids of ``model`` with something to predict, int64 [n, T], T at least 2.

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


def _read(model: NormfreeForCausalLM, input_ids: torch.Tensor) -> _Written:
    n_layer = model.config.n_layer
    first, *_, last = readers_of_residual_stream(model)
    modules = [first, *head_projections(model), *neuron_projections(model), last]
    embedding, *inputs, final = read_inputs(model, input_ids, modules)
    return _Written(embedding, inputs[:n_layer], inputs[n_layer:], final)


def _components(model: NormfreeForCausalLM, neurons: bool) -> pd.DataFrame:
    rows: list[tuple[str, int | None, int | None]] = [(EMBEDDING, None, None)]
    for layer, (heads, ffn) in enumerate(zip(head_projections(model), neuron_projections(model), strict=True)):
        rows += [(HEAD, layer, head) for head in range(model.config.n_head)]
        if heads.bias is not None:
            rows.append((ATTENTION_BIAS, layer, None))
        if not neurons:
            rows.append((MLP, layer, None))
            continue
        rows += [(NEURON, layer, neuron) for neuron in range(model.config.n_inner)]
        if ffn.bias is not None:
            rows.append((MLP_BIAS, layer, None))
    frame = pd.DataFrame(rows, columns=["kind", "layer", "index"])
    return frame.astype({"layer": "Int64", "index": "Int64"})


def _contributions(
    model: NormfreeForCausalLM,
    readout: Readout,
    written: _Written,
    targets: torch.Tensor,
    against: torch.Tensor | None,
    constant_std: float | None,
    neurons: bool,
) -> torch.Tensor:
    """Float64 [n_component, batch, T], in the order of :func:`_components`."""
    std = readout.std(written.final) if constant_std is None else constant_std
    direction = readout.directions(targets, against) / std

    def by_part(activations: torch.Tensor, projection: nn.Linear, n_part: int) -> torch.Tensor:
        # Reading the direction back through the projection keeps [batch, T, n_inner, n_embd] from being built.
        products = activations.double() * (direction @ projection.weight.double())
        return products.unflatten(-1, (n_part, -1)).sum(dim=-1).movedim(-1, 0)

    parts = [(written.embedding.double() * direction).sum(dim=-1)[None]]
    layers = zip(head_projections(model), written.heads, neuron_projections(model), written.neurons, strict=True)
    for o_proj, heads, down_proj, activations in layers:
        parts.append(by_part(heads, o_proj, model.config.n_head))
        if o_proj.bias is not None:
            parts.append((direction @ o_proj.bias.double())[None])
        mlp = [by_part(activations, down_proj, model.config.n_inner if neurons else 1)]
        if down_proj.bias is not None:
            mlp.append((direction @ down_proj.bias.double())[None])
        parts += mlp if neurons else [torch.stack(mlp).sum(dim=0)]
    return torch.cat(parts)


def _effects(
    model: NormfreeForCausalLM,
    readout: Readout,
    written: _Written,
    targets: torch.Tensor,
    against: torch.Tensor | None,
) -> torch.Tensor:
    """Float64 [n_component, batch, T], in the order of :func:`_components` without neurons."""
    final = written.final.double()
    logits = readout.logits(final, targets, against)
    return torch.stack(
        [logits - readout.logits(final - output, targets, against) for output in _outputs(model, written)]
    )


def _outputs(model: NormfreeForCausalLM, written: _Written) -> Iterator[torch.Tensor]:
    """What each component writes into the residual stream, one after the other: float64 [batch, T, n_embd]."""
    yield written.embedding.double()
    for layer, (o_proj, down_proj) in enumerate(zip(head_projections(model), neuron_projections(model), strict=True)):
        heads = written.heads[layer].double().chunk(model.config.n_head, dim=-1)
        for output, weight in zip(heads, o_proj.weight.double().chunk(model.config.n_head, dim=1), strict=True):
            yield output @ weight.T
        if o_proj.bias is not None:
            yield o_proj.bias.double().expand_as(written.final)
        mlp = written.neurons[layer].double() @ down_proj.weight.double().T
        if down_proj.bias is not None:
            mlp += down_proj.bias.double()
        yield mlp
