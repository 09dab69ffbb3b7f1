"""The attention entropy of every head of a transformers model, while it trains, evaluates or generates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normfree.columns import ENTROPY_NATS, SCORES_INF_COUNT, SCORES_NAN_COUNT
from normfree.entropy.fused import BACKENDS
from normfree.errors import InputError, unknown_name
from normfree.probes.attention_probe import AttentionProbe
from normfree.probes.layer_statistics import LayerStatistics
from normfree.probes.measuring import measure_call
from normfree.probes.probe import LayerRow, rows_by_head, rows_by_layer
from normfree.probes.watching import Attending, Row


class EntropyProbe(AttentionProbe[LayerStatistics]):
    """Attention entropy of every head, from the forward passes that ``model`` makes while the probe is active.

    Entropies are those of ReLU's Revival, Eq. 8, without its ε: nats, mean over the queries of all sequences. ::

        with EntropyProbe(model) as probe:
            for batch in batches:
                model(**batch)
        probe.per_head()

    Queries, keys and mask come from transformers' attention interface; modules that compute attention themselves are
    read by their softmax or ``scaled_dot_product_attention``. Outputs, gradients and random numbers of the model stay
    the same, bit for bit. The probe works in training, under autocast, and with a KV cache, where each call adds its
    queries. Entropy is that of the softmax, before attention dropout.

    - Observation: nothing is attached to the model, which can be copied, pickled and saved meanwhile. Errors inside the
      probe never reach the model; they are the reasons in ``unreadable``.
    - Layers: the modules seen to attend, then those expected to and not seen, in the model's order; ``layers`` names
      them. An unreadable layer is NaN in every result (0 in counts).
    - Repeated calls: each softmax of a module in one forward pass (ALBERT, looped models) has a row, ``name (call 2)``
      and so on, after all first ones. One softmax applied to several values (DiffLlama) counts once. A forward pass is
      a call of the outermost transformers model, or of the outermost module without one: ``model(...)``, not
      ``model.forward(...)``. Recomputation under gradient checkpointing does not count.
    - Padding: queries that cannot see their own key are padding, on either side, and do not count. If a sparse mask
      hides own keys too and the two cannot be told apart, the layer is unreadable.
    - Packing: sequences packed into one row, which no query's attention crosses, are read one by one, each with
      positions from 0 and its own first key.
    - NaN: a query with NaN entropy (a NaN or infinite score) makes the mean it belongs to NaN; ``nan_rows`` counts.
    - Positions count from 0 at the first key of the model's row, left padding and KV cache included.
    - Counted although undone: queries of passes that ended in an exception (``interrupted``), and of tokens later
      cropped from a cache (``taken_back``).
    - ``torch.compile``: compiled code shows nothing, and its layers are unreadable, unless the step runs under
      ``torch.compiler.set_stance("force_eager")``.

    Args:
        model: any module that contains a transformers model, wrapped (DDP, PEFT) or not.
        count_nonfinite: also count NaN and infinite attention scores, as
            :func:`normfree.entropy.count_nonfinite_scores` does.
        backend: as in :func:`normfree.entropy.attention_entropy`; "auto" also reads the weights that an eager attention
            function returns in float32.

    Raises:
        InputError: nothing in the model attends, or the backend is unknown.
    """

    def __init__(self, model: nn.Module, *, count_nonfinite: bool = False, backend: str = "auto") -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise unknown_name("entropy backend", backend, ["auto", *BACKENDS])
        super().__init__(model)
        self._model_name = type(model).__name__
        self._backend = backend
        self._count_nonfinite = count_nonfinite

    def __repr__(self) -> str:
        """Model, state, and how much has been seen."""
        read, unreadable = len(self._readable()), len(self._watch.refused)
        n_queries = max((int(each.rows.sum()) for each in self._readable().values()), default=0)
        state = "active" if self._attached is not None else "not active"
        refused = f", {unreadable} unreadable" if unreadable else ""
        return f"EntropyProbe({self._model_name}: {state}, {n_queries:,} queries in {read} layers{refused})"

    @property
    def interrupted(self) -> int:
        """Forward passes that ended in an exception; the layers that had attended by then counted their queries."""
        return self._watch.passes.n_interrupted

    @property
    def taken_back(self) -> int:
        """Tokens cropped from a cache after their queries were counted, as assisted decoding does."""
        return self._watch.passes.n_taken_back

    def per_head(self) -> Tensor:
        """Mean entropy over all queries, float32 [n_layer, n_head], nats; NaN for a head with any NaN query."""
        return self._mean_entropy().float()

    def per_position(self) -> Tensor:
        """Mean entropy of the queries at each position, float32 [n_layer, n_head, T], nats.

        NaN where a query of that head and position was NaN, and where no query was seen.
        """
        n_position = max((each.n_position for each in self._readable().values()), default=0)

        def means(layer: LayerStatistics) -> Tensor:
            mean = (layer.entropy / layer.rows).masked_fill(layer.nan_rows > 0, torch.nan)
            return torch.nn.functional.pad(mean, (0, n_position - layer.n_position), value=torch.nan)

        return self._stack(means).float()

    def maximum(self) -> Tensor:
        """Upper bound of ``per_head``: mean of ln(number of visible keys, learned sink included) over the same queries.

        float32 [n_layer, n_head], nats.
        """
        return self._mean_bound().float()

    def normalized(self) -> Tensor:
        """``per_head`` over ``maximum``, float32 [n_layer, n_head]; NaN also where every query sees one key only."""
        return (self._mean_entropy() / self._mean_bound()).float()

    def sink_share(self) -> Tensor:
        """Mean attention paid to the first key of the sequence, float32 [n_layer, n_head].

        Queries that continue a KV cache do not count. The first key is that of the query's own sequence, padding left
        out. NaN for a head with any NaN query.
        """
        share = self._stack(lambda layer: layer.sink / layer.sink_rows)
        return share.masked_fill(self.nan_rows() > 0, torch.nan).float()

    def sink_query_share(self) -> Tensor:
        """Share of queries that pay more than 0.3 of their attention to the first key, float32 [n_layer, n_head].

        Of the same queries as :meth:`sink_share`, with NaN for the same heads. The first query sees no other key.
        """
        share = self._stack(lambda layer: layer.sink_queries / layer.sink_rows)
        return share.masked_fill(self.nan_rows() > 0, torch.nan).float()

    def rows(self) -> Tensor:
        """Queries seen, NaN ones included: int64 [n_layer, n_head]."""
        return self._stack(lambda layer: layer.rows.sum().expand(layer.n_head), empty=0)

    def nan_rows(self) -> Tensor:
        """Queries with NaN entropy: int64 [n_layer, n_head]."""
        return self._stack(lambda layer: layer.nan_rows.sum(-1), empty=0)

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        """``(nan, inf)``: the numbers of NaN and of infinite attention scores, each int64 [n_layer, n_head].

        Raises:
            InputError: the probe was made without ``count_nonfinite=True``.
        """
        if not self._count_nonfinite:
            raise InputError("non-finite scores were not counted; make the probe with count_nonfinite=True")
        nan = self._stack(lambda layer: layer.nan_scores, empty=0)
        return nan, self._stack(lambda layer: layer.inf_scores, empty=0)

    def layer_rows(self) -> Iterator[LayerRow]:
        """``entropy_nats`` of each head; with ``count_nonfinite`` the layers' numbers of NaN and infinite scores.

        Raises:
            InputError: no layer could be read, or the layers differ in their number of heads.
        """
        yield from rows_by_head(ENTROPY_NATS, self.per_head())
        if self._count_nonfinite:
            nan, inf = self.nonfinite()
            yield from rows_by_layer({SCORES_NAN_COUNT: nan.sum(dim=1), SCORES_INF_COUNT: inf.sum(dim=1)})

    def _read(self, row: Row, attending: Attending) -> None:
        measured = measure_call(self._parts, attending, self._backend, self._count_nonfinite)
        for queries, entropy, sink_share, nonfinite in measured:
            n_head, n_position = entropy.shape[1], queries.start + entropy.shape[2]
            if row not in self._seen:
                self._seen[row] = LayerStatistics.zeros(n_head, n_position, entropy.device)
            layer = self._seen[row]
            self._check_heads(layer, n_head)
            layer.add(queries, entropy, sink_share)
            if nonfinite is not None:
                layer.add_nonfinite(nonfinite)

    def _shape(self, seen: LayerStatistics) -> tuple[int, ...]:
        return seen.n_head, seen.n_position

    def _reduce_layer(
        self, seen: LayerStatistics | None, shape: tuple[int, ...], device: torch.device
    ) -> LayerStatistics:
        n_head, n_position = shape
        layer = seen or LayerStatistics.zeros(n_head, n_position, device)
        layer.grow(n_position)
        layer.all_reduce()
        return layer

    def _mean_entropy(self) -> Tensor:
        mean = self._stack(lambda layer: layer.entropy.sum(-1)) / self.rows()
        return mean.masked_fill(self.nan_rows() > 0, torch.nan)

    def _mean_bound(self) -> Tensor:
        return self._stack(lambda layer: layer.bound.sum(-1)) / self.rows()
