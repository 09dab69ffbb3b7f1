"""A model with constant stds as a stock model that every tool can load."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.removal.stock.gpt2 import gpt2_model, gpt2_weights
from normfree.removal.stock.gpt_neox import gpt_neox_model, gpt_neox_weights
from normfree.removal.stock.llama import llama_model, llama_weights

StockModel = GPT2LMHeadModel | GPTNeoXForCausalLM | LlamaForCausalLM


@torch.no_grad()
def to_stock(model: NormfreeForCausalLM) -> StockModel:
    """A stock model of transformers with the logits of ``model``, whose norms all have a constant std.

    Models with learned positions become a ``GPT2LMHeadModel``, those with rotary positions a ``GPTNeoXForCausalLM``
    (dense feed-forward network) or a ``LlamaForCausalLM`` (gated). Each norm becomes one that does nothing, with ε =
    1e12 and gain' = gain sqrt(ε) / σ ("Transformers Don't Need LayerNorm at Inference Time", Section 3; see
    :mod:`normfree.removal.stock.harmless`). Where values have another σ than queries and keys, the difference is in
    their weights. For a model without any norm op use :func:`normfree.remove_norms`.

    Args:
        model: its ``norm`` and ``final_norm`` are ``constant_std``, as in the checkpoints of a finished removal; it is
            left as it is.

    Returns:
        A model of the same dtype (not float16), on the same device, in the same mode. Weights are made in float64.

    Raises:
        InputError: the model has other norms, an option that the stock architecture has no counterpart for, or
            float16 weights.
    """
    if model.dtype == torch.float16:
        raise InputError("float16 cannot hold the gains of about 1e6; convert the model to float32 or bfloat16 first")
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    stock: Any
    if config.position == "learned":
        stock, stock_weights = gpt2_model(config), gpt2_weights(weights, config)
    elif config.ffn == "gated":
        stock, stock_weights = llama_model(config), llama_weights(weights, config)
    else:
        stock, stock_weights = gpt_neox_model(config), gpt_neox_weights(weights, config)
    stock.load_state_dict(stock_weights)
    stock.generation_config = model.generation_config
    exported: StockModel = stock.to(device=model.device, dtype=model.dtype)
    return exported.train(model.training)
