"""The calls of the blocks of a transformers decoder in one pass: recorded, run again and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.interpret.decoder_parts import replaced
from normfree.modeling.decoder_blocks import decoder_blocks
from normfree.training.evaluation import sequence_losses

STREAM_KEYWORD = "hidden_states"
"""transformers' name of a block's first argument, the residual stream, where it is passed by keyword."""


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    stream: the residual stream it read, [batch, T, d].
    output: the residual stream it returned, or a tuple that begins with it.
    """

    block: nn.Module
    stream: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any

    @property
    def output_stream(self) -> torch.Tensor:
        """The residual stream that the block returned, [batch, T, d]."""
        return _stream_in(self.output)

    def output_with(self, stream: torch.Tensor) -> Any:
        """The output with ``stream`` as its residual stream."""
        return (stream, *self.output[1:]) if isinstance(self.output, tuple) else stream

    def skipped(self, *arguments: Any, **keywords: Any) -> Any:
        """Replaces the block's ``forward`` by the identity."""
        return self.output_with(_stream_of(arguments, keywords))

    def run(self, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream that the block returns for another input ``stream`` and the same other arguments."""
        if STREAM_KEYWORD in self.keywords:
            return _stream_in(self.block(*self.arguments, **{**self.keywords, STREAM_KEYWORD: stream}))
        return _stream_in(self.block(stream, *self.arguments[1:], **self.keywords))


@dataclass(frozen=True)
class RecordedPass:
    """One pass of a model over ``tokens`` [batch, T], with the calls of its blocks, in order.

    logits: [batch, T, vocab_size].
    n_beginning: tokens that every sequence begins with, which are not predicted.
    """

    model: PreTrainedModel
    tokens: torch.Tensor
    calls: Sequence[BlockCall]
    logits: torch.Tensor
    n_beginning: int = 0

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """The mean next-token loss of each sequence, nats, float32 [batch], from logits [batch, T, vocab_size]."""
        known = max(0, self.n_beginning - 1)
        return sequence_losses(logits[:, known:], self.tokens[:, known:])

    @property
    def streams(self) -> list[torch.Tensor]:
        """The residual stream at the input of each block and after the last: n_layer + 1 tensors [batch, T, d]."""
        return [*(call.stream for call in self.calls), self.calls[-1].output_stream]

    def logits_with(self, outputs: Mapping[int, Any]) -> torch.Tensor:
        """The logits with ``outputs`` as the outputs of their layers' blocks, which are not run."""
        with self._replaced(_constants(outputs)):
            return self.model(input_ids=self.tokens, use_cache=False).logits

    def logits_without(self, layers: Iterable[int]) -> torch.Tensor:
        """The logits with the blocks of ``layers`` replaced by the identity."""
        with self._replaced({layer: self.calls[layer].skipped for layer in layers}):
            return self.model(input_ids=self.tokens, use_cache=False).logits

    def stream_after(self, layer: int, outputs: Mapping[int, Any]) -> torch.Tensor:
        """The residual stream after block ``layer`` with ``outputs`` as the outputs of their layers' blocks."""
        found: list[Any] = []
        hook = self.calls[layer].block.register_forward_hook(lambda module, inputs, output: found.append(output))
        with hook, self._replaced(_constants(outputs)):
            self.model.base_model(input_ids=self.tokens, use_cache=False)
        return _stream_in(found[0])

    @contextmanager
    def _replaced(self, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, forward in forwards.items():
                stack.enter_context(replaced(self.calls[layer].block, forward))
            yield


def record(model: PreTrainedModel, tokens: torch.Tensor, n_beginning: int = 0) -> RecordedPass:
    """Runs ``model`` over ``tokens`` (int64 [batch, T], no padding) and records every block's call.

    Raises:
        InputError: the model has no list of decoder blocks, or one of them is not called exactly once, or does not map
            activations [batch, T, d] to such.
    """
    blocks = decoder_blocks(model)
    found: dict[str, BlockCall] = {}
    with ExitStack() as stack:
        for name, block in blocks.items():

            def keep(
                module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any, name: str = name
            ) -> None:
                if name in found:
                    raise InputError(f"{name} of {type(model).__name__} is called more than once a pass: not a layer")
                stream = _checked_stream(_stream_of(arguments, keywords), f"{name} of {type(model).__name__} reads")
                _checked_stream(_stream_in(output), f"{name} puts out")
                found[name] = BlockCall(module, stream, arguments, keywords, output)

            stack.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        tokens = tokens.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits
    missing = [name for name in blocks if name not in found]
    if missing:
        raise InputError(f"{missing[0]} of {type(model).__name__} is not called in a forward pass: not a layer")
    return RecordedPass(model, tokens, [found[name] for name in blocks], logits, n_beginning)


@torch.no_grad()
def check_independence(recorded: RecordedPass) -> None:
    """Checks that blocks depend on one another through the residual stream alone, so that one of them can be skipped.

    Every block is run alone: the block before it returns its recorded residual stream, all others return their outputs
    for other tokens. The block must return its recorded output. So must the readout when only the last block returns
    its recorded residual stream. This costs about three passes over the tokens.

    Shared keys and values (YOCO, Gemma 3n, Gemma 4), connections across layers and state that one block leaves for
    another are found in any layer.

    Raises:
        InputError: a block, or the readout, reads more than the residual stream of the block before it.
    """
    calls, name = recorded.calls, type(recorded.model).__name__
    blocks = list(decoder_blocks(recorded.model))
    for layer in range(1, len(calls)):
        if not _same(calls[layer].stream, calls[layer - 1].output_stream):
            raise InputError(
                f"{blocks[layer]} of {name} does not read the residual stream as {blocks[layer - 1]} returns it: the "
                "model changes it between blocks, so no block can be skipped"
            )
    other = record(recorded.model, _other_tokens(recorded)).calls
    readout = {layer: call.output for layer, call in enumerate(other)}
    readout[len(calls) - 1] = other[-1].output_with(calls[-1].output_stream)
    if not _same(_unless_raised(lambda: recorded.logits_with(readout), f"the readout of {name}"), recorded.logits):
        raise InputError(_depends(f"the readout of {name}"))
    # From the last to the first, so that state left for later blocks is still that of the other tokens.
    for layer in reversed(range(len(calls))):
        outputs = {at: call.output for at, call in enumerate(other) if at != layer}
        if layer:
            outputs[layer - 1] = other[layer - 1].output_with(calls[layer - 1].output_stream)
        what = f"{blocks[layer]} of {name}"
        found = _unless_raised(partial(recorded.stream_after, layer, outputs), what)
        if not _same(found, calls[layer].output_stream):
            raise InputError(_depends(what))


def _other_tokens(recorded: RecordedPass) -> torch.Tensor:
    """The tokens rotated by one position; if that changes nothing, each plus one."""
    moved = recorded.tokens.roll(1, dims=1)
    if not torch.equal(moved, recorded.tokens):
        return moved
    return (recorded.tokens + 1) % recorded.model.config.get_text_config().vocab_size


def _depends(what: str) -> str:
    return (
        f"{what} reads more of other blocks than the residual stream of the one before it (shared keys and values, a "
        "connection across layers): no block can be skipped alone"
    )


def _unless_raised(compute: Callable[[], torch.Tensor], what: str) -> torch.Tensor:
    """The result of ``compute``; an error means that the model misses another block's state."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(_depends(what)) from error


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to rounding, relative to each token's largest channel."""
    if found.shape != expected.shape:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(expected.dtype).eps)
    found, expected = found.double(), expected.double()
    size = expected.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=-1, keepdim=True)
    is_close = (found - expected).abs() <= tolerance * size
    return bool((is_close | (found == expected) | (found.isnan() & expected.isnan())).all())


def _checked_stream(x: Any, where: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.ndim != 3:
        shown = f"a tensor of {x.ndim} dimensions" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"{where} {shown}, not a residual stream [batch, T, d]; its depth cannot be measured")
    return x


def _stream_in(output: Any) -> Any:
    """The residual stream in a block's output."""
    return output[0] if isinstance(output, tuple) else output


def _constants(outputs: Mapping[int, Any]) -> dict[int, Callable[..., Any]]:
    """For each block, a ``forward`` that returns its output."""
    return {layer: lambda *_, output=output, **__: output for layer, output in outputs.items()}


def _stream_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    return keywords[STREAM_KEYWORD] if STREAM_KEYWORD in keywords else next(iter(arguments), None)
