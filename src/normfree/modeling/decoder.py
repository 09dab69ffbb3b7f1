"""The one decoder-only language model. It knows no paper: every study is a configuration of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from normfree.entropy.scoring import soft_capped
from normfree.errors import InputError
from normfree.modeling.activations import LearnableLeakyReLU
from normfree.modeling.attention import ATTENTIONS, SoftmaxAttention, check_softcap_implementation
from normfree.modeling.blocks import Block, build_block
from normfree.modeling.cache_keyword import CACHE, takes_either_name
from normfree.modeling.configuration import NormfreeConfig
from normfree.modeling.embedding import build_embedding, positions_after, positions_among_tokens
from normfree.modeling.initialization import INITIAL_SCALE, InitializesItself, ResidualProjection
from normfree.modeling.layer_types import attention_masks
from normfree.modeling.linear_cross_entropy import NOT_PREDICTED, SoftTargets, linear_cross_entropy
from normfree.modeling.norms import build_final_norm
from normfree.modeling.rotary import build_rotary, outgrows_cached_keys, rotations


class NormfreePreTrainedModel(PreTrainedModel):
    """Normfree's models in transformers' terms, and the initial values of their weights."""

    config: NormfreeConfig
    config_class = NormfreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": SoftmaxAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) for weights, zero for biases, one for gains, the configured value for slopes and α.

        Norms, placements and activations draw no random numbers: with one seed, configurations that differ only in
        them start from the same weights, some of them β times as large with DeepNorm.
        """
        super()._init_weights(module)
        if isinstance(module, InitializesItself):
            module.set_initial_values()
        if isinstance(module, NormfreeModel) and module.embedding_scale is not None:
            init.constant_(module.embedding_scale, self.config.n_embd**0.5)
        scale = getattr(module, INITIAL_SCALE, None)
        if isinstance(module, nn.Linear) and scale and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight.mul_(scale)
        if isinstance(module, ResidualProjection) and self.config.scale_residual_init:
            std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
            init.normal_(module.weight, std=std)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """transformers' check, and that of an attention with one implementation.

        Raises:
            InputError: the attention has no such implementation, or it cannot soft-cap scores.
        """
        only = ATTENTIONS[self.config.attention].implementation
        if self.config.attn_logit_softcapping is not None:
            check_softcap_implementation(attn_implementation)
            attn_implementation = attn_implementation or "eager"
        if only is None:
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attn_implementation not in (None, only):
            raise InputError(
                f"attention {self.config.attention} has the implementation {only} only, not {attn_implementation!r}; "
                f"leave attn_implementation out, or use {only}"
            )
        return only


class NormfreeModel(NormfreePreTrainedModel):
    """Token ids [batch, T] to the final residual stream [batch, T, n_embd], normalized by ``final_norm``."""

    def __init__(self, config: NormfreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = build_embedding(config)
        self.embed_positions = nn.Embedding(config.n_positions, config.n_embd) if config.position == "learned" else None
        self.rotary_embedding = build_rotary(config)
        self.embedding_scale = nn.Parameter(torch.full((1,), config.n_embd**0.5)) if config.scale_embeddings else None
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList([build_block(config, layer) for layer in range(config.n_layer)])
        self.final_norm = build_final_norm(config)
        self.gradient_checkpointing = False
        self._tied_weights_keys = self._tied_slopes()
        self.post_init()

    def _tied_slopes(self) -> dict[str, str]:
        """The slopes tied to the first one, by name; empty without a global slope."""
        if self.config.slope_sharing != "global":
            return {}
        first, *rest = (
            f"{name}.negative_slope" for name, module in self.named_modules() if isinstance(module, LearnableLeakyReLU)
        )
        return dict.fromkeys(rest, first)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Ties a global slope also where embeddings are not tied: transformers would then tie nothing."""
        return self._tied_slopes()

    @takes_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """One pass; ``attention_mask`` [batch, T] is 1 for tokens and 0 for padding.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds`` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            if self.config.positions_skip_padding and attention_mask is not None:
                position_ids = positions_among_tokens(seen, attention_mask)
            else:
                position_ids = positions_after(seen, inputs_embeds)

        named_cache: dict[str, Any] = {CACHE: cache}
        kinds = self.config.layer_types
        masks = attention_masks(
            kinds,
            attention_mask,
            config=self.config,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **named_cache,
        )
        x = inputs_embeds
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale.to(x.dtype)
        rotated = rotations(self.rotary_embedding, kinds, x, position_ids)
        x = self.embedding_dropout(x)
        # A block that is computed again in the backward pass would append its keys twice.
        is_checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            # A block keeps its kind where others are removed; what may replace one (nn.Identity) has none.
            kind = getattr(block, "layer_type", kinds[0])
            x = block(
                x,
                attention_mask=masks[kind],
                position_embeddings=rotated[kind],
                cache=None if is_checkpointed else cache,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_norm(x), **named_cache)


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers' output and, where logits were not asked for, values of each token [batch, T - 1] in nats.

    token_losses: cross-entropy.
    token_divergences: KL from the teacher's distributions, given ``soft_targets``.
    """

    token_losses: torch.Tensor | None = None
    token_divergences: torch.Tensor | None = None


class NormfreeForCausalLM(NormfreePreTrainedModel, GenerationMixin):
    """The decoder with its unembedding: next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: NormfreeConfig) -> None:
        super().__init__(config)
        self.model = NormfreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @takes_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        soft_targets: SoftTargets | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [batch, T, vocab_size] and, given ``labels`` [batch, T], the mean next-token loss in nats.

        Labels are shifted inside, as everywhere in transformers; -100 marks a position that does not count. With
        ``num_items_in_batch`` the loss is the sum over tokens divided by that number. Without ``return_logits`` there
        are no logits: the loss is made in blocks of tokens (:func:`linear_cross_entropy`), in a fraction of the time
        and memory, and the output has ``token_losses``, float32 [batch, T - 1], without gradients. It may mix in what
        a teacher predicts, its ``soft_targets``.

        Raises:
            ValueError: neither logits nor, by ``labels``, a loss is asked for; or both logits and ``soft_targets``.
        """
        if labels is None and not return_logits:
            raise ValueError("return_logits=False needs labels")
        if soft_targets is not None and return_logits:
            raise ValueError("soft_targets needs return_logits=False")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden, softcap = outputs.last_hidden_state, self.config.final_logit_softcapping
        assert hidden is not None
        logits = loss = found = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = soft_capped(self.lm_head(hidden[:, keep, :]), softcap)
        if labels is not None and return_logits:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif labels is not None:
            found = linear_cross_entropy(hidden, self.lm_head, labels, softcap=softcap, soft_targets=soft_targets)
            n_predicted = kwargs.get("num_items_in_batch")
            loss = found.total / ((labels[:, 1:] != NOT_PREDICTED).sum() if n_predicted is None else n_predicted)
        named_cache: dict[str, Any] = {CACHE: outputs.get(CACHE)}
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_losses=None if found is None else found.losses,
            token_divergences=None if found is None else found.divergences,
            **named_cache,
        )

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' inputs of the next step, without a cache whose keys have outdated frequencies."""
        if outgrows_cached_keys(self.config, input_ids, kwargs.get(CACHE), kwargs.get("attention_mask")):
            args, kwargs = (), {**kwargs, CACHE: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


AutoConfig.register("normfree", NormfreeConfig)
AutoModel.register(NormfreeConfig, NormfreeModel)
AutoModelForCausalLM.register(NormfreeConfig, NormfreeForCausalLM)
