"""The attention entropy of one forward pass with its gradient, for loss terms."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from normfree.errors import InputError
from normfree.probes.interception import SoftmaxCall
from normfree.probes.probe import Attachable
from normfree.probes.reading import Attention, UnreadableCallError, read_call
from normfree.probes.watching import Attending, AttentionWatch, Row


class EntropyRecorder(Attachable):
    """Context manager around one forward pass of ``model``, whose entropies are differentiable afterwards. ::

        with EntropyRecorder(model) as recorded:
            loss = model(input_ids, labels=input_ids).loss
        (loss + 0.1 * recorded.per_head().mean()).backward()

    It keeps the queries and keys of the pass, which its gradient needs anyway, and computes entropies on request,
    without the T×T matrix. Leave it before the backward pass, where gradient checkpointing calls the attention again.
    Code compiled by ``torch.compile`` shows nothing. Modules that attend several times have an entropy for each.

    Raises:
        InputError: nothing in the model attends.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watch = AttentionWatch(model, self._record)
        self._attentions: dict[Row, Attention] = {}

    def per_head(self) -> Tensor:
        """Entropy of each sequence, layer and head, mean over the queries: float32 [batch, n_layer, n_head], nats.

        Differentiable in queries, keys, position biases and learned sinks. Sequences must have no padding; NaN if a
        query of the head is NaN (a non-finite score).

        Raises:
            InputError: a layer's attention could not be read, or layers differ in their number of heads.
        """
        rows = self._watch.rows
        for row in rows:
            if row not in self._attentions or row in self._watch.refused:
                reason = self._watch.refused.get(row) or self._watch.why_unseen(row)
                raise InputError(f"the attention entropy of {self._watch.name(row)} cannot be read: {reason}")
        layers = [self._attentions[row].entropy().mean(dim=-1) for row in rows]
        if len({layer.shape for layer in layers}) > 1:
            raise InputError("the layers of this model differ in their number of heads: no common table of heads")
        return torch.stack(layers, dim=1)

    def _attach(self, stack: ExitStack) -> None:
        stack.enter_context(self._watch.watch())

    def _record(self, row: Row, attending: Attending) -> None:
        if isinstance(attending.call, SoftmaxCall):
            raise UnreadableCallError("it computes its softmax itself, which has no entropy with a gradient")
        attention = read_call(attending.call)
        if attention.selects:
            raise UnreadableCallError("it attends to selected keys, not to all that queries and keys speak of")
        if attention.sequences:
            raise UnreadableCallError("several sequences are packed into one row")
        if row in self._attentions:
            raise UnreadableCallError("more than one forward pass was recorded")
        self._attentions[row] = attention
