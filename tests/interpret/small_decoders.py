"""Small random decoders of every kind that interpretability has to take apart, with weights of a size that matters."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import normfree
from normfree import NormfreeConfig, NormfreeForCausalLM

VOCAB_SIZE = 50
T = 7
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}


def stirred(model, scale=0.3):
    """``model`` with every parameter moved at random, so that gains are not ones and biases not zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.25)
    return model.eval()


def gpt2():
    config = GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=VOCAB_SIZE, n_positions=16, **TOKENS)
    return normfree.from_hf(stirred(GPT2LMHeadModel(config)))


def gpt_neox():
    config = GPTNeoXConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=16,
        use_parallel_residual=True,
        **TOKENS,
    )
    return normfree.from_hf(stirred(GPTNeoXForCausalLM(config)))


def llama():
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        **TOKENS,
    )
    return normfree.from_hf(stirred(LlamaForCausalLM(config)))


def decoder(**options):
    """Three layers without any norm, unless ``options`` say otherwise."""
    sizes: dict[str, Any] = {
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 32,
        "n_inner": 40,
        "vocab_size": VOCAB_SIZE,
        "n_positions": 16,
    }
    config = NormfreeConfig(**{**sizes, "norm": "none", "final_norm": "none", **options})
    return stirred(NormfreeForCausalLM(config), scale=0.5)


def constant_std():
    model = decoder(norm="layernorm", final_norm="constant_std", lm_head_bias=True)
    model.model.final_norm.std.fill_(1.7)
    return model


def parallel_norm_free():
    return decoder(parallel_residual=True, position="rotary", tie_word_embeddings=False)


NORMED = {"gpt2": gpt2, "gpt_neox": gpt_neox, "llama": llama}
LINEAR_READOUT = {"norm_free": decoder, "parallel_norm_free": parallel_norm_free, "constant_std": constant_std}
ALL = NORMED | LINEAR_READOUT


def tokens(*shape, seed=0):
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
