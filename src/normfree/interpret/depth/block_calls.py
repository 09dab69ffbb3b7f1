"""The calls of a decoder's blocks in one pass: read, run again, and replaced, of any transformers decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from normfree.errors import InputError
from normfree.modeling.residual_stream import decoder_blocks

STREAM_KEYWORD = "hidden_states"
"""What transformers names a block's first argument, the residual stream, where it is passed by keyword."""


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: what it was given, and what it put out, a residual stream or a tuple that begins with it.

    stream: the residual stream it read, [batch, T, d].
    """

    block: nn.Module
    stream: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    output: Any

    @property
    def output_stream(self) -> torch.Tensor:
        """The residual stream that the block put out, [batch, T, d]."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def output_with(self, stream: torch.Tensor) -> Any:
        """What the block put out, with ``stream`` in place of its residual stream."""
        return (stream, *self.output[1:]) if isinstance(self.output, tuple) else stream

    def skipped(self, *arguments: Any, **keywords: Any) -> Any:
        """In place of the block's ``forward``: the residual stream as it comes."""
        return self.output_with(_stream_of(arguments, keywords))

    def run(self, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream that the block makes of another ``stream``, all else as it was."""
        if STREAM_KEYWORD in self.keywords:
            output = self.block(*self.arguments, **{**self.keywords, STREAM_KEYWORD: stream})
        else:
            output = self.block(stream, *self.arguments[1:], **self.keywords)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class RecordedPass:
    """One pass of a model over ``tokens`` [batch, T], with the calls of its blocks, in order.

    logits: [batch, T, vocab_size].
    """

    model: PreTrainedModel
    tokens: torch.Tensor
    calls: Sequence[BlockCall]
    logits: torch.Tensor

    @property
    def streams(self) -> list[torch.Tensor]:
        """The residual stream at the input of each block and after the last, n_layer + 1 of [batch, T, d]."""
        return [*(call.stream for call in self.calls), self.calls[-1].output_stream]

    def logits_with(self, outputs: Mapping[int, Any]) -> torch.Tensor:
        """The logits if each block in ``outputs`` put out what stands there, without being computed."""
        return self._logits({layer: lambda *_, output=output, **__: output for layer, output in outputs.items()})

    def logits_without(self, layers: Iterable[int]) -> torch.Tensor:
        """The logits with the blocks of ``layers`` skipped, each the identity."""
        return self._logits({layer: self.calls[layer].skipped for layer in layers})

    def _logits(self, forwards: Mapping[int, Callable[..., Any]]) -> torch.Tensor:
        with ExitStack() as stack:
            for layer, forward in forwards.items():
                stack.enter_context(_replaced(self.calls[layer].block, forward))
            return self.model(input_ids=self.tokens, use_cache=False).logits


def record(model: PreTrainedModel, tokens: torch.Tensor) -> RecordedPass:
    """Runs ``model`` over ``tokens`` (int64 [batch, T], no padding) and keeps every block's call.

    Raises:
        InputError: the model has no list of decoder blocks, or one of them is not called once, or does not read and put
            out activations [batch, T, d].
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
                _checked_stream(output[0] if isinstance(output, tuple) else output, f"{name} puts out")
                found[name] = BlockCall(module, stream, arguments, keywords, output)

            stack.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        tokens = tokens.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits
    missing = [name for name in blocks if name not in found]
    if missing:
        raise InputError(f"{missing[0]} of {type(model).__name__} is not called in a forward pass: not a layer")
    return RecordedPass(model, tokens, [found[name] for name in blocks], logits)


@torch.no_grad()
def check_independence(recorded: RecordedPass) -> None:
    """Checks that blocks depend on one another through the residual stream alone, as skipping one of them supposes.

    The first half of them is replaced by what it put out, which must leave the logits as they are.

    Raises:
        InputError: it does not.
    """
    first = range(max(1, len(recorded.calls) // 2))
    name = type(recorded.model).__name__
    refusal = f"later blocks of {name} read more of the earlier ones than the residual stream; no layer stands alone"
    try:
        logits = recorded.logits_with({layer: recorded.calls[layer].output for layer in first})
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError(refusal) from error
    if not torch.allclose(logits, recorded.logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise InputError(refusal)


def _checked_stream(x: Any, where: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.ndim != 3:
        shown = f"a tensor of {x.ndim} dimensions" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"{where} {shown}, not a residual stream [batch, T, d]; its depth cannot be measured")
    return x


def _stream_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    return keywords[STREAM_KEYWORD] if STREAM_KEYWORD in keywords else next(iter(arguments), None)


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While active, ``block`` computes ``forward``."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
