"""What Normfree reads and does of one architecture, measured against the model itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from normfree import EntropyProbe, from_hf
from normfree.errors import InputError
from normfree.interpret import measure_depth
from normfree.interpret.pruning import prune_layers
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.removal import remove_norms
from normfree.removal.midway import Midway
from normfree.removal.parts import QKNorms, parts_to_remove
from normfree.removal.schedule import automatic_schedule
from tests.coverage.reference import Batch, Seen, Softmax, eager_copy, see
from tests.coverage.tiny_models import VOCAB, tiny_model

TOLERANCE = 1e-5
"""Nats, of entropies; of a logit, relative to the largest."""
N_TOKEN = 20
N_PADDING = 5
N_PROMPT = 12
PADDINGS = ("none", "left", "right")
FAULTY = "faulty"
READ, PARTLY, REFUSED, NO_ATTENTION, NO_REFERENCE = "read", "partly read", "refused", "no attention", "no reference"
YES, LAST_ONLY = "yes", "last layers only"


@dataclass
class Row:
    """One architecture. ``faults`` holds what is neither right nor refused, and is empty.

    status: how :class:`~normfree.EntropyProbe` reads it, and ``reason`` why it does not, or not all of it.
    agreement_nats: the largest disagreement with eager attention in a mean entropy, of a head or of a head at a
        position, in any layer, padding and implementation.
    depth, prune_layers, from_hf, remove_norm: ``yes``, ``last layers only`` or the reason of the refusal.
    """

    model_type: str
    architecture: str = ""
    status: str = ""
    reason: str = ""
    agreement_nats: float = float("nan")
    depth: str = ""
    prune_layers: str = ""
    from_hf: str = ""
    remove_norm: str = ""
    faults: list[str] = field(default_factory=list)


def examine(model_type: str) -> Row:
    """Everything about one model type that can be built."""
    row = Row(model_type)
    with _quiet():
        model = tiny_model(model_type)
        row.architecture = type(model).__name__
        _examine_probe(model, row)
        _examine(row, "depth", lambda: _check_depth(model))
        _examine(row, "prune_layers", lambda: _check_pruning(model))
        _examine(row, "from_hf", lambda: _check_conversion(model))
        _examine(row, "remove_norm", lambda: _check_removal(model))
    return row


def batch_of(padding: str) -> Batch:
    """Two sequences; the first or the last ``N_PADDING`` tokens of the second are padding."""
    tokens = torch.randint(3, VOCAB, (2, N_TOKEN), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[1, slice(N_PADDING) if padding == "left" else slice(-N_PADDING, None)] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _examine(row: Row, name: str, check: Callable[[], str]) -> None:
    setattr(row, name, FAULTY)
    try:
        with _noting_faults(row, name):
            setattr(row, name, check())
    except InputError as refusal:
        setattr(row, name, str(refusal))
        if "\n" in str(refusal):
            row.faults.append(f"{name}: refused in more than one line: {refusal}")


def _examine_probe(model: PreTrainedModel, row: Row) -> None:
    models = [model, eager_copy(model)]
    found: list[tuple[str, str]] = []
    for padding in PADDINGS:
        batch = batch_of(padding)
        seen = see(model, batch)
        if len(seen.returned) == len(seen.softmaxes) and not seen.are_returned:
            row.faults.append(f"reference, {padding}: the attentions returned are not those of the softmaxes")
        for each in models:
            with _noting_faults(row, f"probe, {padding}, {each.config._attn_implementation}"):
                try:
                    found.append(_read(each, batch, seen, row))
                except InputError as refusal:
                    found.append((REFUSED if seen.softmaxes else NO_ATTENTION, str(refusal)))
    with _noting_faults(row, "probe, with a cache"), suppress(InputError):  # refused without a cache too
        _check_cached(model)
    if row.faults:
        row.status = FAULTY
        return
    order = (REFUSED, PARTLY, NO_REFERENCE, READ, NO_ATTENTION)
    row.status, row.reason = min(found, key=lambda each: order.index(each[0]))


@contextmanager
def _noting_faults(row: Row, where: str) -> Iterator[None]:
    """Notes as faults of ``row`` what is wrong and what is raised, other than refusals."""
    try:
        yield
    except InputError:
        raise
    except AssertionError as wrong:
        row.faults.append(f"{where}: {wrong}")
    except Exception as error:
        row.faults.append(f"{where}: raises {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


def _read(model: PreTrainedModel, batch: Batch, seen: Seen, row: Row) -> tuple[str, str]:
    """Status and reason of one probed pass; ``row`` has the worst agreement so far."""
    probe = EntropyProbe(model)
    with torch.no_grad():
        torch.manual_seed(0)  # of hashed attention
        bare = model(**batch).logits
        torch.manual_seed(0)
        with probe:
            logits = model(**batch).logits
    assert torch.equal(bare, logits), "the probe changes the logits"
    refused, by_module = probe.unreadable, seen.by_module
    reasons = "; ".join(dict.fromkeys(refused.values()))
    if len(refused) == len(probe.layers):
        return (REFUSED if by_module else NO_ATTENTION), reasons
    per_head, per_position = probe.per_head().double().numpy(), probe.per_position().double().numpy()
    rows, sink_share = probe.rows(), probe.sink_share().double().numpy()
    real = batch["attention_mask"].numpy().astype(bool)
    expected = _by_row(probe.layers, by_module)
    status = PARTLY if refused else READ
    for place, name in enumerate(probe.layers):
        if name in refused:
            continue
        if name not in expected:
            assert not by_module, f"{name} is read, and computes no softmax over tokens"
            status = NO_REFERENCE
            continue
        softmax = expected.pop(name)
        assert int(rows[place, 0]) == real.sum(), f"{name}: {int(rows[place, 0])} queries of {real.sum()}"
        assert per_position.shape[-1] == N_TOKEN, f"{name}: {per_position.shape[-1]} positions of {N_TOKEN}"
        difference = _difference(softmax.entropy, real, per_head[place], per_position[place])
        row.agreement_nats = float(np.nanmax([row.agreement_nats, difference]))
        assert difference <= TOLERANCE, f"{name}: {difference:.2g} nats off"
        first = np.take_along_axis(softmax.weights, real.argmax(-1)[:, None, None, None], -1)[..., 0]
        off = np.abs((first * real[:, None]).sum((0, 2)) / real.sum() - sink_share[place]).max()
        assert off <= TOLERANCE, f"{name}: its share of the first key is {off:.2g} off"
    unread = [name for name in expected if not any(_is_part(name.split(" (")[0], each) for each in refused)]
    assert not unread, f"{unread[0]} is in no row"
    return status, reasons


def _check_cached(model: PreTrainedModel) -> None:
    """The same of a pass in pieces, with a cache: a prompt, then a token at a time.

    A model whose logits are others then, or that has no cache, is none to compare with.
    """
    batch = batch_of("left")
    real, seen = batch["attention_mask"].numpy().astype(bool), see(model, batch)
    try:
        whole, cached = _logits(model, batch), _cached_logits(model, batch)
    except Exception:  # the model's own
        return
    if cached is None or _relative(cached[real], whole[real]) > 1e-4:
        return
    with EntropyProbe(model) as probe:
        probed = _cached_logits(model, batch)
    assert probed is not None
    assert torch.equal(cached, probed), "the probe changes the logits"
    expected = _by_row(probe.layers, seen.by_module)
    read = [name for name in probe.layers if name not in probe.unreadable and name in expected]
    for name in read:
        place = probe.layers.index(name)
        n_query = int(probe.rows()[place, 0])
        assert n_query == real.sum(), f"{name}: {n_query} queries of {real.sum()}"
        means = (each[place].double().numpy() for each in (probe.per_head(), probe.per_position()))
        difference = _difference(expected[name].entropy, real, *means)
        assert difference <= TOLERANCE, f"{name}: {difference:.2g} nats off"


@torch.no_grad()
def _cached_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor | None:
    """Logits [batch, T, vocab_size] of ``N_PROMPT`` tokens at once and the others one by one; None without a cache."""
    tokens, mask, cache, logits = batch["input_ids"], batch["attention_mask"], None, []
    for start, stop in ((0, N_PROMPT), *((each, each + 1) for each in range(N_PROMPT, N_TOKEN))):
        options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=tokens[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **options)
        cache = output.get("past_key_values", output.get("cache"))
        if cache is None:
            return None
        logits.append(output.logits)
    return torch.cat(logits, dim=1).double()


def _difference(entropy: np.ndarray, real: np.ndarray, per_head: np.ndarray, per_position: np.ndarray) -> float:
    """The largest disagreement with ``entropy`` [batch, n_head, T] over the ``real`` tokens [batch, T], nats."""
    assert entropy.shape[1] == per_head.shape[0], f"{per_head.shape[0]} heads of {entropy.shape[1]}"
    entropy = np.where(real[:, None], entropy, 0)
    of_heads = np.abs(entropy.sum((0, 2)) / real.sum() - per_head)
    of_positions = np.abs(entropy.sum(0) / np.maximum(real.sum(0), 1) - per_position)[:, real.any(0)]
    return float(max(of_heads.max(), of_positions.max()))


def _by_row(layers: tuple[str, ...], by_module: dict[str, list[Softmax]]) -> dict[str, Softmax]:
    """The softmax of each row, rows of later ones of a module being called ``NAME (call 2)`` and so on."""
    found: dict[str, Softmax] = {}
    for module, softmaxes in by_module.items():
        name = next((each for each in sorted(layers, key=len) if _is_part(module, each)), module)
        for repeat, softmax in enumerate(softmaxes):
            found[name if repeat == 0 else f"{name} (call {repeat + 1})"] = softmax
    return found


def _is_part(module: str, row: str) -> bool:
    return module == row or module.startswith(f"{row}.") or row.startswith(f"{module}.")


def _check_depth(model: PreTrainedModel) -> str:
    tokens = batch_of("none")["input_ids"][:, :12]
    found = measure_depth(model, tokens, n_probe=2)
    loss = _loss(model, tokens)
    measured = float(found.summary["loss_nats"].iloc[0])
    assert abs(measured - loss) <= TOLERANCE * max(1, loss), f"loss {measured:.6f} nats for {loss:.6f}"
    skipped = found.skipped_layers
    blocks = list(decoder_blocks(model).values())
    assert len(skipped) == len(blocks)
    for layer, block in enumerate(blocks):
        with _skipped([block]):
            expected = _loss(model, tokens) - loss
        increase = float(skipped["loss_increase_nats"].iloc[layer])
        assert abs(increase - expected) <= 1e-4, f"without layer {layer} {increase:+.6f} nats for {expected:+.6f}"
    return YES


def _check_pruning(model: PreTrainedModel) -> str:
    n_layer = len(decoder_blocks(model))
    refusals = []
    for dropped in ([1], [n_layer - 1]):
        try:
            pruned = prune_layers(model, dropped)
        except InputError as refusal:
            refusals.append(refusal)
            continue
        blocks = list(decoder_blocks(model).values())
        with _skipped([blocks[layer] for layer in dropped]):
            expected = _logits(model, batch_of("none"))
        off = _relative(_logits(pruned, batch_of("none")), expected)
        assert off <= 1e-4, f"without {dropped} the logits are {off:.2g} off"
    if len(refusals) == 2:
        raise refusals[0]
    return LAST_ONLY if refusals else YES


def _check_conversion(model: PreTrainedModel) -> str:
    converted = from_hf(model)
    for padding in PADDINGS:
        batch = batch_of(padding)
        real = batch["attention_mask"].bool()
        off = _relative(_logits(converted, batch)[real], _logits(model, batch)[real])
        assert off <= TOLERANCE, f"padding {padding}: the logits are {off:.2g} off"
    return YES


def _check_removal(model: PreTrainedModel) -> str:
    """Norms made constant at the stds of one batch, and folded away; in float64, where only the algebra is left."""
    model = copy.deepcopy(model).double()
    batch: dict[str, Any] = {"input_ids": batch_of("none")["input_ids"]}
    converted = from_hf(model)
    qk_norms: QKNorms = "keep" if converted.config.qk_norm == "none" else "remove"
    parts = parts_to_remove(converted.config, qk_norms)
    midway = Midway(converted, automatic_schedule(converted.config.n_layer, 300, parts, qk_norms))
    off = _relative(_logits(converted, batch), _logits(model, batch))
    assert off <= TOLERANCE, f"with removable norms the logits are {off:.2g} off"
    converted.train()(**batch)
    for _, norm in midway.norms():
        for reader in range(len(norm.std)):
            norm.make_constant(reader)
    midway.tokens.shares = dict.fromkeys(midway.tokens.shares, 0.0)
    expected = _logits(converted.eval(), batch)
    off = _relative(_logits(remove_norms(_reloaded(midway, converted)), batch), expected)
    assert off <= TOLERANCE, f"without norms the logits are {off:.2g} off those with constant ones"
    return YES


def _reloaded(midway: Midway, model: NormfreeForCausalLM) -> NormfreeForCausalLM:
    midway.finish()
    constant = type(model)(model.config).double()
    constant.load_state_dict(model.state_dict())
    return constant.eval()


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False).logits.double()


def _loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    logits = _logits(model, {"input_ids": tokens})
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def _relative(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x - expected).abs().max() / expected.abs().max().clamp_min(1))


@contextmanager
def _skipped(blocks: list[torch.nn.Module]) -> Iterator[None]:
    """While active, each block puts out the residual stream that it reads."""

    def skip(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        stream = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handles = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of fallbacks and of options that do not fit tiny models."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
