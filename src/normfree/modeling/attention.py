"""Attention, by name: [batch, T, n_embd] to [batch, T, n_embd], mixing positions.

A new one is one ``nn.Module`` built from ``(config, layer)`` and one line in ``ATTENTIONS``. ``SoftmaxAttention`` calls
transformers' attention interface (``sdpa``, ``eager``, ``flex_attention``, ...), where ``normfree.EntropyProbe`` reads
queries and keys. On a CPU, compiled kernels compute what ``sdpa`` would, where they can.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from normfree.entropy import compiled_attention
from normfree.entropy.scoring import soft_capped
from normfree.errors import InputError
from normfree.model_options import Named, one_of, option, positive, probability
from normfree.modeling.initialization import ResidualProjection
from normfree.modeling.layer_types import SLIDING, LayerTypeOptions
from normfree.modeling.qk_norms import QKNormOptions, build_head_norm
from normfree.spark.sizes import SparkOptions
from normfree.spark.sparse_attention import Rotation, SparkKeys

BIASED_PROJECTIONS = {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo"}
"""Values of ``attention_bias`` and the projections that have a bias under each."""
SDPA, EAGER = "sdpa", "eager"
WITHOUT_SOFTCAP = (SDPA,)
"""Attention implementations of transformers that cannot soft-cap scores."""
SHORT = 512
"""Tokens up to which, without compiled kernels, eager attention trains faster in bf16 on a CPU than torch's sdpa."""
COMPILED = "normfree_compiled"
"""Name of :func:`compiled_attention_forward` in transformers' attention interface."""


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that materialises its weights (ReLU's Revival, Eq. 2): the ``eager`` implementation.

    query [batch, n_head, n_query, head_dim]; key and value [batch, n_kv_head, n_key, head_dim]; ``attention_mask``
    additive, broadcastable to [batch, n_head, n_query, n_key]; ``softcap``: scores s become softcap tanh(s / softcap)
    before the mask (Gemma 2, 2024, Section 2). Returns the output [batch, n_query, n_head, head_dim] and the weights,
    float32 or float64 [batch, n_head, n_query, n_key].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = soft_capped(query @ key.transpose(-1, -2) * scaling, softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def compiled_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, compiled_attention.Attended]:
    """``sdpa``'s causal attention without a mask, in one pass with its entropy; see :func:`causal_attention`.

    In place of weights, it returns what probes read of them.
    """
    attended = compiled_attention.causal_attention(query, key, value, scaling)
    return attended.output, attended


AttentionInterface.register(COMPILED, compiled_attention_forward)


def _with_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as ``sdpa`` casts them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [each if each.dtype == torch.float64 else each.to(dtype) for each in tensors]


def _trains_faster_eagerly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """True for short causal attention in bf16 on a CPU, whose backward pass torch's ``sdpa`` computes slowly."""
    return (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and 1 < query.shape[2] == key.shape[2] <= SHORT
        and query.requires_grad
        and torch.is_grad_enabled()
    )


def check_softcap_implementation(name: str | None) -> None:
    """Checks that the attention implementation ``name`` can soft-cap scores.

    Raises:
        InputError: it cannot.
    """
    if name in WITHOUT_SOFTCAP:
        raise InputError(
            f"attention implementation {name!r} cannot soft-cap scores, and attn_logit_softcapping is set; "
            "use eager (of a run: recipe.attn_implementation: eager), or flex_attention"
        )


@dataclass(kw_only=True)
class AttentionOptions(QKNormOptions, LayerTypeOptions, SparkOptions):
    """Attention
    ``attention``: ``softmax | spark``; ``attention_bias``: which projections have a bias, ``none | qk | qkv | all``
    (also ``False``, ``True`` for ``none``, ``all``); ``attention_scale``: factor of the scores q·k, default
    1/sqrt(``head_dim``); ``attn_logit_softcapping``: scores s become c tanh(s / c) (Gemma 2; softmax only);
    ``attention_dropout``: 0 by default.
    """

    attention: str = option("softmax", check=one_of(lambda: ATTENTIONS))
    attention_bias: Named = option(
        "all",
        check=one_of(BIASED_PROJECTIONS),
        read=lambda options, value: {True: "all", False: "none"}[value] if isinstance(value, bool) else value,
    )
    attention_scale: float | int | None = option(check=positive)
    attn_logit_softcapping: float | int | None = option(check=positive)
    attention_dropout: float | int = option(0.0, check=probability)

    def check_together(self) -> None:
        if self.attention != "spark":
            return
        for name in ("attention_scale", "attn_logit_softcapping"):
            if getattr(self, name) is not None:
                raise InputError(f"{name} is not defined for attention 'spark'; leave it out, or use softmax")
        if self.sliding_window is not None:
            raise InputError(
                "sliding_window is not defined for attention 'spark', which chooses its keys among all before the "
                "query; leave it out, or use attention: softmax"
            )


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention with optional grouped keys and rotary positions (ReLU's Revival, Eq. 2 and 3).

    Queries and keys, or queries, keys and values may be normalized (:mod:`normfree.modeling.qk_norms`), before
    positions rotate them and before they enter the cache.
    """

    is_causal = True
    implementation: str | None = None
    """The one name of transformers' implementations that it has; None: those of transformers."""

    def __init__(self, config: AttentionOptions, layer: int) -> None:
        super().__init__()
        # The names that transformers' attention implementations read.
        self.config: Any = config
        self.layer_idx = layer
        self.num_key_value_groups = config.n_head // config.n_kv_head
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.sliding_window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        self.softcap = config.attn_logit_softcapping
        biased = BIASED_PROJECTIONS[config.attention_bias]
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias="q" in biased)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias="k" in biased)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias="v" in biased)
        self.o_proj = ResidualProjection(config.n_head * config.head_dim, config.n_embd, bias="o" in biased)
        self.q_norm = build_head_norm(config, layer, "q")
        self.k_norm = build_head_norm(config, layer, "k")
        self.v_norm = build_head_norm(config, layer, "v")

    def forward(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Rotation | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [batch, T, n_embd] and, where the implementation materialises them, the attention weights.

        ``x`` may be a pair: what queries and keys are made from, and what values are.
        """
        query, key, value = self.project(x, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def project(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        position_embeddings: Rotation | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [batch, heads, T, head_dim], normalized and rotated: what a cache stores."""
        x, value_input = x if isinstance(x, tuple) else (x, x)
        head_shape = (*x.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(head_shape)).transpose(1, 2)
        value = self.v_norm(self.v_proj(value_input).view(head_shape)).transpose(1, 2)
        if position_embeddings is not None:
            query, key = self.rotate(query, key, position_embeddings)
        return query, key, value

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies rotary positions to query and key [batch, heads, T, head_dim]."""
        rotated: tuple[torch.Tensor, torch.Tensor] = apply_rotary_pos_emb(query, key, *position_embeddings)
        return rotated

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [batch, n_query, n_head, head_dim], and the weights if they are materialised."""
        dropout = self.config.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if self.softcap is not None:
            check_softcap_implementation(implementation)
            kwargs["softcap"] = self.softcap  # transformers' name, which its implementations and probes read
        is_causal = self.is_causal and kwargs.get("is_causal") is not False
        on_cpu = query.device.type == "cpu"
        if on_cpu and implementation == SDPA and is_causal and attention_mask is None and dropout == 0:
            cast = _with_autocast(query, key, value)
            if compiled_attention.takes(*cast):
                (query, key, value), implementation = cast, COMPILED
            elif _trains_faster_eagerly(*cast):
                implementation = EAGER
                attention_mask = torch.full(2 * query.shape[2:3], -torch.inf, dtype=query.dtype).triu(1)[None, None]
        attend: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output, weights if implementation == self.config._attn_implementation else None


class SparkAttention(SparkKeys, SoftmaxAttention):
    """Sparse attention with the projections, the cache and so the parameters of softmax attention."""

    def __init__(self, config: AttentionOptions, layer: int) -> None:
        super().__init__(config, layer)
        assert config.topk is not None, "filled in for spark"
        sizes = config.spark_sizes
        self.set_choice(sizes.attention_predictor_dim, sizes.attention_active, config.topk)


ATTENTIONS: dict[str, type[SoftmaxAttention]] = {"softmax": SoftmaxAttention, "spark": SparkAttention}


def build_attention(config: AttentionOptions, layer: int) -> nn.Module:
    """The attention of block ``layer`` (from 0)."""
    return ATTENTIONS[config.attention](config, layer)
