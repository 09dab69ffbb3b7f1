"""GPT-J (Wang & Komatsuzaki 2021)."""

from __future__ import annotations

from math import inf, nextafter
from typing import Any

import torch

from normfree.errors import InputError
from normfree.modeling.conversion.family import (
    Options,
    Weights,
    activation_name,
    converts,
    renamed,
    shared_options,
    with_own_ffn_norm,
)

BASE = 10000.0
"""GPT-J's rotary base; its configuration has no option for it."""
NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.blocks.",
    "transformer.ln_f.": "model.final_norm.",
    ".ln_1.": ".attention_norm.",
    ".attn.": ".attention.",
    ".out_proj.": ".o_proj.",
    ".mlp.fc_in.": ".ffn.up_proj.",
    ".mlp.fc_out.": ".ffn.down_proj.",
}


@converts("gptj", "GPTJForCausalLM")
def convert_gptj(model: Any) -> tuple[Options, Weights]:
    """Attention and feed-forward network read one LayerNorm; here each reads its own copy.

    GPT-J rotates neighbouring dimensions (2i, 2i + 1) of each head, Normfree i and i + ``rotary_dim``/2: the rows of
    the query and key projections are reordered, which changes no product of a query and a key.
    """
    hf = model.config
    head_dim = hf.hidden_size // hf.num_attention_heads
    _check_rotary(model, head_dim)
    options = {
        **shared_options(model),
        "n_inner": hf.n_inner,
        "norm_eps": hf.layer_norm_epsilon,
        "parallel_residual": True,
        "activation": activation_name(hf, "activation_function"),
        "attention_bias": "none",
        "position": "rotary",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": BASE,
            "partial_rotary_factor": _share(hf.rotary_dim, head_dim),
        },
        "lm_head_bias": True,
        "embedding_dropout": hf.embd_pdrop,
        "attention_dropout": hf.attn_pdrop,
        "residual_dropout": hf.resid_pdrop,
    }
    weights = with_own_ffn_norm(renamed(model, NAMES))
    for name, weight in weights.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            weights[name] = _half_split(weight, hf.num_attention_heads, hf.rotary_dim)
    return options, weights


def _half_split(weight: torch.Tensor, n_head: int, rotary_dim: int) -> torch.Tensor:
    """The rows of a projection [n_head head_dim, n_embd]: of each head the even rotated ones, the odd, the others."""
    rows = torch.arange(weight.shape[0] // n_head, device=weight.device)
    rotated, others = rows[:rotary_dim], rows[rotary_dim:]
    order = torch.cat([rotated[::2], rotated[1::2], others])
    return weight.unflatten(0, (n_head, -1))[:, order].flatten(0, 1)


def _share(rotary_dim: int, head_dim: int) -> float:
    """The factor whose product with ``head_dim`` is ``rotary_dim`` after truncation to an integer."""
    share = rotary_dim / head_dim
    return share if int(head_dim * share) == rotary_dim else nextafter(share, inf)


def _check_rotary(model: Any, head_dim: int) -> None:
    rotary_dim = model.config.rotary_dim
    if rotary_dim is None or not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise InputError(
            f"from_hf: rotary_dim = {rotary_dim} has no counterpart; only even numbers from 2 to the head_dim "
            f"{head_dim} can be converted"
        )
    # One table of the model since transformers 5.24, one of each layer before.
    tables = [table for name, table in model.named_buffers() if name.endswith("embed_positions")]
    frequencies = 1.0 / (BASE ** (torch.arange(0, rotary_dim, 2, device=tables[0].device) / rotary_dim))
    angles = torch.arange(len(tables[0]), device=tables[0].device).float()[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    if not all(torch.allclose(table, expected.to(table), rtol=0, atol=1e-6) for table in tables):
        raise InputError(
            "from_hf: the sines and cosines of the GPTJForCausalLM are not those of its rotary_dim; they may have been "
            "rounded by a conversion to half precision and back; load the model again, in one dtype"
        )
