"""Small random models of six stock architectures, and batches for them."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

N_HEAD = 4
SIZES = {"num_hidden_layers": 2, "num_attention_heads": N_HEAD, "hidden_size": 32, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 32}

ARCHITECTURES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, SIZES | {"n_positions": 64}, ("attn_pdrop", "resid_pdrop")),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, SIZES | {"intermediate_size": 32}, ("attention_dropout",)),
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED, ("attention_dropout",)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED, ("attention_dropout",)),
    "mistral": (MistralConfig, MistralForCausalLM, GROUPED | {"sliding_window": 6}, ("attention_dropout",)),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        ("attention_dropout",),
    ),
}


def build(name, dropout=0.0, **overrides):
    """In eval mode, with weights large enough for attention far from uniform."""
    config_class, model_class, sizes, dropouts = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = config_class(
        **sizes | {"initializer_range": 0.3} | dict.fromkeys(dropouts, dropout) | overrides, use_cache=True
    )
    config.bos_token_id = config.eos_token_id = None
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    return model


def batch_of(padding, n_token=16, seed=0):
    """Two sequences; of the second, the first or last 4 tokens are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, n_token, dtype=torch.int64)
    if padding != "none":
        mask[1, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
    return {"input_ids": torch.randint(1, 50, (2, n_token), generator=generator), "attention_mask": mask}
