"""The places of our decoder that interpretability reads and changes: each is the input of one of its modules.

The input of an attention's ``o_proj`` holds the outputs of its heads side by side; the input of a feed-forward
network's ``down_proj`` its neurons' activations; the input of a block, or of the final norm, the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.initialization import ResidualProjection


def check_decoder(model: NormfreeForCausalLM) -> None:
    """Checks that what the blocks of ``model`` write adds up to the input of the final norm.

    Raises:
        InputError: it is no :class:`~normfree.NormfreeForCausalLM`, its norms are not before attention and
            feed-forward network, or it is in training mode, where dropout makes every pass another.
    """
    if not isinstance(model, NormfreeForCausalLM):
        raise InputError(f"cannot take a {type(model).__name__} apart; convert it with normfree.from_hf first")
    if model.config.norm_placement != "pre":
        raise InputError(
            f"norm_placement is {model.config.norm_placement!r}: its norms are on the residual stream or on what is "
            "written into it, which is then no sum of what heads and neurons write; use a model with norm_placement "
            "'pre'"
        )
    if model.training:
        raise InputError("the model is in training mode; call model.eval() first")


def check_tokens(model: NormfreeForCausalLM, tokens: torch.Tensor, name: str, shape: Sequence[int | None]) -> None:
    """Checks that ``tokens`` are token ids of ``model``, int64 of the ``shape`` (None: at least 1).

    Raises:
        InputError: another dtype, another shape, an id outside the vocabulary, or more positions than the model has.
    """
    fits = len(shape) == tokens.ndim and all(
        n == size or (size is None and n > 0) for n, size in zip(tokens.shape, shape, strict=True)
    )
    if tokens.dtype != torch.int64 or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name} must be int64 token ids of shape [{wanted}], not empty; got {tokens.dtype} {list(tokens.shape)}"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.config.vocab_size:
        raise InputError(
            f"{name} hold token ids from {int(tokens.min())} to {int(tokens.max())}; "
            f"the vocabulary of the model is 0 to {model.config.vocab_size - 1}"
        )
    if tokens.ndim == 2 and tokens.shape[1] > model.config.n_positions:
        raise InputError(
            f"{name} are {tokens.shape[1]} tokens long, more than the {model.config.n_positions} positions of the model"
        )


def head_projections(model: NormfreeForCausalLM) -> list[ResidualProjection]:
    """The map of each layer from its heads' outputs [batch, T, n_head head_dim] to the residual stream."""
    return [block.attention.o_proj for block in _blocks(model)]


def neuron_projections(model: NormfreeForCausalLM) -> list[ResidualProjection]:
    """The map of each layer from its neurons' activations [batch, T, n_inner] to the residual stream."""
    return [block.ffn.down_proj for block in _blocks(model)]


def readers_of_residual_stream(model: NormfreeForCausalLM) -> list[nn.Module]:
    """The modules whose inputs are the residual stream: after the embedding, then after each block."""
    return [*_blocks(model), model.model.final_norm]


@contextmanager
def intercepted(
    modules: Sequence[nn.Module], function: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """While active, ``function(place, x)`` sees the input x of ``modules[place]``; what it returns replaces x.

    None leaves x as it is.
    """

    def hook(place: int) -> Callable[[nn.Module, tuple[Any, ...]], torch.Tensor | None]:
        return lambda module, inputs: function(place, inputs[0])

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(hook(place)).remove)
        yield


def read_inputs(
    model: NormfreeForCausalLM, input_ids: torch.Tensor, modules: Sequence[nn.Module]
) -> list[torch.Tensor]:
    """The inputs of ``modules`` when the decoder reads ``input_ids`` [batch, T]; the unembedding is not computed."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(place: int, x: torch.Tensor) -> None:
        inputs[place] = x

    with intercepted(modules, keep):
        model.model(input_ids=input_ids.to(model.device), use_cache=False)
    return [inputs[place] for place in range(len(modules))]


def _blocks(model: NormfreeForCausalLM) -> list[Any]:
    return list(model.model.blocks)
