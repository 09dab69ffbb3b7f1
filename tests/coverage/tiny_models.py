"""Tiny random models of every causal LM architecture that transformers has.

A configuration is shrunk field by field: what a field is called says how small it may be. ``EXCEPTIONS`` holds what no
name tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

N_LAYER = 4
N_HEAD = 4
N_KV_HEAD = 2
HEAD_DIM = 16
HIDDEN = N_HEAD * HEAD_DIM
INNER = 48
VOCAB = 64
WINDOW = 6
N_POSITIONS = 64
LARGEST = 5_000_000
"""Parameters that a tiny model may have."""

_SIZES = (
    (
        HIDDEN,
        """hidden_size d_model n_embd emb_dim embedding_size embedding_dim input_embedding_size word_embed_proj_dim
        output_embedding_size lru_width attention_hidden_size pronunciation_embed_dim shape_embed_dim
        adapter_in_dim adapter_out_dim adapter_input_size""",
    ),
    (
        INNER,
        """intermediate_size ffn_dim d_inner dff dim_ff n_inner encoder_ffn_dim decoder_ffn_dim feed_forward_size
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size prompt_mid_dim""",
    ),
    (
        N_LAYER,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers num_layers_per_stack num_blocks""",
    ),
    (
        N_HEAD,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads index_n_heads
        linear_num_heads linear_num_value_heads mamba_num_heads num_experts num_local_experts n_routed_experts
        moe_num_experts num_attention_heads_per_layer""",
    ),
    (
        N_KV_HEAD,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k n_groups moe_num_shared_experts""",
    ),
    (
        HEAD_DIM,
        """head_dim global_head_dim swa_head_dim attention_head_dim attention_head_size d_head dim_head kv_channels
        qk_rope_head_dim qk_nope_head_dim v_head_dim swa_v_head_dim index_head_dim linear_head_dim linear_key_head_dim
        linear_value_head_dim q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_headdim
        query_pre_attn_scalar laurel_rank hidden_size_per_layer_input router_hidden_size gated_norm_rank loop_gate_rank
        hc_lowrank adapter_rank ple_embed_dim""",
    ),
    (
        8,
        """mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size rotary_dim
        rel_extent d_rel index_topk index_block_size block_size attention_chunk_size keep_window_size num_buckets
        relative_max_distance position_bias_num_buckets position_bias_max_distance local_attn_chunk_length
        mamba_n_heads lsh_attn_chunk_length floor_scale segment_types prompt_types prompt_length""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size window_size local_attention attention_window_size
        local_attention_window_len""",
    ),
    (
        VOCAB,
        """vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab dim_model_base""",
    ),
    (
        N_POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        max_source_positions model_max_length original_max_position_embeddings log_scaling_n_floor mem_len""",
    ),
    (1, "n_group topk_group num_expert_group num_shared_experts n_shared_experts num_dense_layers max_window_layers"),
    (2, "sliding_window_pattern _sliding_window_pattern num_kv_shared_layers first_k_dense_replace"),
)
TINY: Mapping[str, int] = {name: size for size, names in _SIZES for name in names.split()}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA_ATTENTION = {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM}
_QWEN4_INDEXER = {
    "indexer_n_heads": N_HEAD,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_DOTS3_SLIDING = {"head_dim": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32}
_DOTS3_LAYERS = {"num_key_value_heads": N_HEAD, "per_layer_config": {"01": _DOTS3_SLIDING, "03": _DOTS3_SLIDING}}
_GEMMA4_LAYERS = {"num_kv_shared_layers": 2, "per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}}}

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": N_KV_HEAD, "clip_qkv": 2.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots1": {"n_routed_experts": N_HEAD, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": _DOTS3_LAYERS},
    "dots3_note_text": _DOTS3_LAYERS,
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "gemma3n_text": {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4": {"text_config": _GEMMA4_LAYERS},
    "gemma4_text": _GEMMA4_LAYERS,
    "gemma4_unified": {"text_config": _GEMMA4_LAYERS},
    "gemma4_unified_text": _GEMMA4_LAYERS,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 2 * N_HEAD},
    "ministral": {"head_dim": HEAD_DIM},
    "moshi": {"audio_vocab_size": VOCAB},
    "nemotron": {"num_key_value_heads": N_KV_HEAD},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _MAMBA_ATTENTION,
    "zamba2": {**_MAMBA_ATTENTION, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 2 * N_HEAD},
    "zaya": {"num_experts_per_tok": 1},
}
"""What no name of a field tells, by model type."""


UNBUILT: Mapping[str, str] = {
    "blt": "four nested models that read patches of bytes",
    "gemma3n": "its vision tower is of the package timm; its language model is gemma3n_text",
    "gemma4_assistant": "reads the hidden states and keys of the model that it drafts for, not tokens alone",
    "gemma4_unified_assistant": "reads the hidden states and keys of the model that it drafts for, not tokens alone",
    "musicgen": "its configuration is that of three models; its decoder reads audio codes of several codebooks",
    "musicgen_melody": "its configuration is that of three models; its decoder reads audio codes of several codebooks",
}
"""Model types without a tiny model that reads tokens, and why."""


def model_types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` knows and a tiny model can be built of, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - UNBUILT.keys())


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model in evaluation mode, float32 on the CPU, with all kinds of layers that the architecture has.

    Windows and selections are smaller than the sequences of a test, and the weights make attention sharp.
    """
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_shrunk(config_class, EXCEPTIONS.get(model_type, {})))
    with torch.device("meta"):
        n_parameter = AutoModelForCausalLM.from_config(config).num_parameters()
    if n_parameter > LARGEST:
        raise ValueError(f"its smallest configuration has {n_parameter:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model)
    return model.eval()


def _shrunk(config_class: type[PreTrainedConfig], exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """Options for ``config_class``: the sizes of its defaults made small, and ``exceptions``."""
    parts = config_class.sub_configs
    own = {name: value for name, value in exceptions.items() if name not in parts}
    default = config_class()
    n_layer = getattr(default, "num_hidden_layers", None)
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in parts and isinstance(value, dict):
            part = CONFIG_MAPPING[value["model_type"]] if parts[name] is AutoConfig else parts[name]
            options[name] = {**_shrunk(part, exceptions.get(name, {})), "model_type": value["model_type"]}
        elif (shrunk := _shrunk_value(name, value, n_layer)) is not None:
            options[name] = shrunk
    if "kv_lora_rank" in options:  # multi-head latent attention makes keys for all heads
        options["num_key_value_heads"] = N_HEAD
    if getattr(default, "is_decoder", None) is False:
        options["is_decoder"] = True
    return options | own


def _shrunk_value(name: str, value: Any, n_layer: int | None) -> Any:
    """The tiny value of an option, None where its default is small already."""
    if name in TINY and type(value) is int and value > 0:
        return TINY[name]
    if name == "attention_multiplier":  # Granite's scale of scores; 1.0 is for trained weights
        return HEAD_DIM**-0.5
    if name.endswith("_token_id") and isinstance(value, (int, list)):
        return [2] if isinstance(value, list) else min(value, 2)
    if isinstance(value, list) and value and len(value) == n_layer:
        return [TINY[name]] * N_LAYER if name in TINY else _every_kind(value)
    return None


def _every_kind(by_layer: list[Any]) -> list[Any]:
    """``N_LAYER`` entries of a list with one a layer, all kinds that it has among them, in turns."""
    kinds = list(dict.fromkeys(by_layer))
    return [kinds[layer % len(kinds)] for layer in range(N_LAYER)]


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Gives matrices entries of std 1.25/sqrt(fan-in), so that scores are units apart; moves the rest by a tenth."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 1.25 / parameter.shape[-1] ** 0.5)
        elif bool((parameter == 0).all()):
            parameter.copy_(0.1 * noise)
        else:
            parameter.mul_(1 + 0.1 * noise)
