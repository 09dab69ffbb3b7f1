"""Mean-ablation of MLP neurons: what it does to the loss and to the entropy of the output, one by one or together.

Stolfo et al., "Confidence Regulation Neurons in Language Models", 2024, Section 3; together as in "Transformers Don't
Need LayerNorm at Inference Time", 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pandas as pd
import torch

from normfree.errors import InputError
from normfree.interpret.decoder_parts import (
    check_decoder,
    intercepted,
    neuron_projections,
    read_inputs,
    readers_of_residual_stream,
    starting_at,
)
from normfree.interpret.direct_logit_attribution import check_predicting
from normfree.interpret.readout import Readout
from normfree.modeling import NormfreeForCausalLM
from normfree.progress import track
from normfree.training.predictions import unembedded_predictions

Neuron = tuple[int, int]
"""Layer and neuron."""


@torch.no_grad()
def neuron_ablation_effects(
    model: NormfreeForCausalLM, sequences: torch.Tensor, neurons: pd.DataFrame, batch_size: int = 8
) -> pd.DataFrame:
    """The effect of mean-ablating single neurons on loss and entropy: in total, and with the final norm's std frozen.

    A neuron's activation is replaced at all positions by its mean over the tokens of ``sequences``. For the frozen
    effect the final norm's σ of each token keeps its value without the ablation, which excludes what σ mediates (Stolfo
    et al., Section 3). Norms inside blocks are never frozen. Without a final norm the two are equal. Each neuron costs
    a pass from its layer on, and the unembedding twice.

    Args:
        model: a pre-norm decoder in evaluation mode.
        sequences: int64 [n, T], T at least 2, no padding.
        neurons: columns layer and neuron, as :func:`~normfree.interpret.confidence_neuron_candidates` returns them.
        batch_size: sequences a pass.

    Returns:
        layer, neuron, mean_activation, total_effect_nats and frozen_effect_nats (means of |loss ablated − loss| over
        the n (T − 1) predicted tokens), total_change_nats and frozen_change_nats (means of loss ablated − loss),
        norm_mediated_share (1 − frozen_effect / total_effect, negative where the norm dampens; NaN without effect); and
        total_entropy_effect_nats, frozen_entropy_effect_nats, total_entropy_change_nats, frozen_entropy_change_nats:
        the same of the output's entropy.

    Raises:
        InputError: the model is of another kind, the sequences do not fit it, or it lacks a neuron.
    """
    pairs = _chosen_neurons(model, neurons)
    ablation = _Ablation(model, sequences, batch_size)
    rows = []
    for (layer, neuron), found in zip(pairs, ablation.of([[pair] for pair in pairs]), strict=True):
        loss, entropy = found - ablation.unablated
        total, frozen = loss.abs().mean(dim=-1)
        mean = {"layer": layer, "neuron": neuron, "mean_activation": ablation.means[layer][neuron].item()}
        share = {"norm_mediated_share": (1 - frozen / total).item()}
        rows.append({**mean, **_effects(loss, ""), **share, **_effects(entropy, "entropy_")})
    return pd.DataFrame(rows)


@torch.no_grad()
def cumulative_ablation(
    model: NormfreeForCausalLM, sequences: torch.Tensor, neurons: pd.DataFrame, batch_size: int = 8
) -> pd.DataFrame:
    """Mean loss and entropy while ``neurons`` are mean-ablated together: none, the first, the first two, and so on.

    As :func:`neuron_ablation_effects`, whose arguments and errors it has. The paper ablates three neurons of the last
    layer that it chose in the original model, in every model compared.

    Returns:
        n_ablated (from 0), layer, neuron (the last to be added; -1 for none), loss_nats, entropy_nats,
        frozen_loss_nats, frozen_entropy_nats (with the final norm's std frozen), loss_change_percent and
        entropy_change_percent (to no ablation, in total).
    """
    pairs = _chosen_neurons(model, neurons)
    if len(set(pairs)) < len(pairs):
        raise InputError("a neuron is ablated twice; name each once")
    ablation = _Ablation(model, sequences, batch_size)
    sets = [pairs[:n] for n in range(1, len(pairs) + 1)]
    rows = []
    for n, found in enumerate([ablation.unablated.expand(2, 2, -1), *ablation.of(sets)]):
        layer, neuron = pairs[n - 1] if n else (-1, -1)
        (loss, frozen_loss), (entropy, frozen_entropy) = found.mean(dim=-1).tolist()
        values = {"loss_nats": loss, "entropy_nats": entropy}
        frozen = {"frozen_loss_nats": frozen_loss, "frozen_entropy_nats": frozen_entropy}
        rows.append({"n_ablated": n, "layer": layer, "neuron": neuron, **values, **frozen})
    frame = pd.DataFrame(rows)
    for name in ("loss", "entropy"):
        frame[f"{name}_change_percent"] = 100 * (frame[f"{name}_nats"] / frame[f"{name}_nats"][0] - 1)
    return frame


class _Ablation:
    """Ablations of sets of neurons on the same sequences.

    means: of each neuron's activation over the tokens, float64 [n_inner] a layer.
    unablated: loss and entropy of every predicted token, nats: float64 [2, 1, n (T − 1)].
    """

    def __init__(self, model: NormfreeForCausalLM, sequences: torch.Tensor, batch_size: int) -> None:
        check_predicting(model, sequences)
        self.model, self.readout = model, Readout.of(model)
        self.batches = sequences.to(model.device).split(batch_size)
        self.projections = neuron_projections(model)
        sums = [torch.zeros(model.config.n_inner, dtype=torch.float64, device=model.device) for _ in self.projections]
        self._stds: list[torch.Tensor] = []
        unablated = []
        for batch in self.batches:
            *activations, final = read_inputs(model, batch, [*self.projections, model.model.final_norm])
            for total, each in zip(sums, activations, strict=True):
                total += each.double().sum(dim=(0, 1))
            self._stds.append(self.readout.std(final))
            unablated.append(self._measured(final, [self._stds[-1]], batch))
        self.means = [total / sequences.numel() for total in sums]
        self.unablated = torch.cat(unablated, dim=-1)

    def of(self, sets: Sequence[Sequence[Neuron]]) -> list[torch.Tensor]:
        """Loss and entropy under each ablation, in total and frozen: float64 [2, 2, n (T − 1)], nats."""
        found: list[list[torch.Tensor]] = [[] for _ in sets]
        blocks = readers_of_residual_stream(self.model)
        work = [(number, place) for number in range(len(self.batches)) for place in range(len(sets))]
        streams: list[torch.Tensor] = []
        for number, place in track(work, "confidence neurons", unit="ablations"):
            batch = self.batches[number]
            if place == 0:
                streams = read_inputs(self.model, batch, blocks)
            with ExitStack() as stack:
                first = min(layer for layer, _ in sets[place])
                stack.enter_context(starting_at(self.model, first, streams[first]))
                stack.enter_context(intercepted(self.projections, self._ablating(sets[place])))
                (final,) = read_inputs(self.model, batch, blocks[-1:])
            stds = self.readout.std(final), self._stds[number]
            found[place].append(self._measured(final, stds, batch))
        return [torch.cat(each, dim=-1) for each in found]

    def _ablating(self, neurons: Sequence[Neuron]) -> Callable[[int, torch.Tensor], torch.Tensor | None]:
        chosen: dict[int, list[int]] = {}
        for layer, neuron in neurons:
            chosen.setdefault(layer, []).append(neuron)

        def ablate(layer: int, activations: torch.Tensor) -> torch.Tensor | None:
            if layer not in chosen:
                return None
            ablated = activations.clone()
            ablated[..., chosen[layer]] = self.means[layer][chosen[layer]].to(ablated.dtype)
            return ablated

        return ablate

    def _measured(self, final: torch.Tensor, stds: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Loss and entropy of every predicted token for each σ of the final norm: float64 [2, n_std, batch (T − 1)]."""
        if self.readout.is_linear and len(stds) > 1:
            return self._measured(final, stds[:1], tokens).expand(-1, len(stds), -1)
        found = []
        for std in stds:
            hidden = self.readout.normalized(final, std).to(self.model.dtype)[:, :-1].flatten(0, 1)
            found.append(unembedded_predictions(self.model.lm_head, hidden, tokens[:, 1:].flatten()))
        return torch.stack(found, dim=1)


def _effects(changes: torch.Tensor, of: str) -> dict[str, float]:
    """Mean size and mean of the changes of every predicted token, [2, n]: in total and frozen."""
    named = zip(("total", "frozen"), changes, strict=True)
    return {
        f"{kind}_{of}{name}_nats": value.mean().item()
        for kind, each in named
        for name, value in (("effect", each.abs()), ("change", each))
    }


def _chosen_neurons(model: NormfreeForCausalLM, neurons: pd.DataFrame) -> list[Neuron]:
    check_decoder(model)
    if missing := [column for column in ("layer", "neuron") if column not in neurons.columns]:
        raise InputError(f"the frame of neurons lacks {', '.join(missing)}; it needs the columns layer and neuron")
    if neurons.empty:
        raise InputError("there is no neuron to ablate; give at least one")
    n_layer, n_inner = model.config.n_layer, model.config.n_inner
    pairs = [(int(layer), int(neuron)) for layer, neuron in neurons[["layer", "neuron"]].to_numpy()]
    for layer, neuron in pairs:
        if not (0 <= layer < n_layer and 0 <= neuron < n_inner):
            raise InputError(
                f"there is no neuron {neuron} in layer {layer}; the model has the layers 0 to {n_layer - 1} with "
                f"the neurons 0 to {n_inner - 1}"
            )
    return pairs
