"""The decoder blocks of any transformers model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from normfree.errors import InputError


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks of ``model``, wrapped (DDP, PEFT) or not, by module name, in order.

    They are the one ``nn.ModuleList`` of transformers' ``GradientCheckpointingLayer``, the base of every decoder block
    (``model.layers``, ``transformer.h``, ``gpt_neox.layers``; in Normfree's models ``model.blocks``). A model that
    also reads images or audio has several: those of its language model, ``get_decoder()``, are taken.

    Raises:
        InputError: there is no such list, or more than one, as in an encoder-decoder.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    }
    if len(lists) > 1 and isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        of_decoder = list(model.get_decoder().children())
        lists = {name: blocks for name, blocks in lists.items() if blocks in of_decoder} or lists
    if len(lists) != 1:
        found = f"has {len(lists)} ({', '.join(lists)})" if lists else "has none"
        raise InputError(
            f"reading the residual stream needs one list of decoder blocks, and {type(model).__name__} {found}; "
            "pass a decoder-only language model of transformers"
        )
    ((name, blocks),) = lists.items()
    return {f"{name}.{layer}": block for layer, block in enumerate(blocks)}
