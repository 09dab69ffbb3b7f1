"""Where interpretability reads and changes Normfree's decoder: the inputs of its modules.

The input of an attention's ``o_proj`` is the outputs of its heads, concatenated; that of a feed-forward network's
``down_proj`` is the activations of its neurons; that of a block, or of the final norm, is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.initialization import ResidualProjection


def check_decoder(model: NormfreeForCausalLM) -> None:
    """Checks that the outputs of the blocks of ``model`` add up to the input of the final norm.

    Raises:
        InputError: it is not a :class:`~normfree.NormfreeForCausalLM`, has no pre-norm placement, or is in training
            mode, where dropout makes passes differ.
    """
    if not isinstance(model, NormfreeForCausalLM):
        raise InputError(f"cannot take a {type(model).__name__} apart; convert it with normfree.from_hf first")
    if model.config.norm_placement != "pre":
        raise InputError(
            f"norm_placement is {model.config.norm_placement!r}: its norms act on the residual stream or on what is "
            "added to it, so the stream is not a sum over heads and neurons; use a model with norm_placement 'pre'"
        )
    if model.training:
        raise InputError("the model is in training mode; call model.eval() first")


def check_tokens(model: NormfreeForCausalLM, tokens: torch.Tensor, name: str, shape: Sequence[int | None]) -> None:
    """Checks that ``tokens`` are token ids of ``model``, int64 of ``shape`` (None: at least 1).

    Raises:
        InputError: another dtype or shape, an id outside the vocabulary, or more positions than the model has.
    """
    fits = len(shape) == tokens.ndim and all(
        n == size or (size is None and n > 0) for n, size in zip(tokens.shape, shape, strict=True)
    )
    if tokens.dtype != torch.int64 or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name} must be int64 token ids of shape [{wanted}], not empty; got {tokens.dtype} {list(tokens.shape)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        raise InputError(
            f"{name} hold token ids from {low} to {high}; the vocabulary of the model is 0 to "
            f"{model.config.vocab_size - 1}"
        )
    if tokens.ndim == 2 and tokens.shape[1] > model.config.n_positions:
        raise InputError(
            f"{name} are {tokens.shape[1]} tokens long, more than the {model.config.n_positions} positions of the model"
        )


def head_projections(model: NormfreeForCausalLM) -> list[ResidualProjection]:
    """The ``o_proj`` of each layer: from the heads' outputs [batch, T, n_head head_dim] to the residual stream."""
    return [block.attention.o_proj for block in _blocks(model)]


def neuron_projections(model: NormfreeForCausalLM) -> list[ResidualProjection]:
    """The ``down_proj`` of each layer: from the neurons' activations [batch, T, n_inner] to the residual stream."""
    return [block.ffn.down_proj for block in _blocks(model)]


def readers_of_residual_stream(model: NormfreeForCausalLM) -> list[nn.Module]:
    """The modules that read the residual stream: after the embedding, then after each block."""
    return [*_blocks(model), model.model.final_norm]


@contextmanager
def intercepted(
    modules: Sequence[nn.Module], function: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """While active, ``function(place, x)`` sees the input x of ``modules[place]``; it returns a replacement or None."""

    def hook(place: int, module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor | None:
        return function(place, inputs[0])

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(partial(hook, place)).remove)
        yield


def read_inputs(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, modules: Sequence[nn.Module]
) -> list[torch.Tensor]:
    """The inputs of ``modules`` in a pass over ``input_ids`` [batch, T]; logits are not computed."""
    inputs: dict[int, torch.Tensor] = {}
    with intercepted(modules, inputs.__setitem__):
        model.model(input_ids=input_ids.to(model.device), use_cache=False)
    return [inputs[place] for place in range(len(modules))]


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While active, ``module`` computes ``forward``."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def starting_at(model: NormfreeForCausalLM, layer: int, stream: torch.Tensor) -> Iterator[None]:
    """While active, passes over the same tokens start at block ``layer``, which reads ``stream`` [batch, T, n_embd]."""
    with ExitStack() as stack:
        for block in _blocks(model)[:layer]:
            stack.enter_context(replaced(block, lambda *_, **__: stream))
        yield


def _blocks(model: NormfreeForCausalLM) -> list[Any]:
    return list(model.model.blocks)
