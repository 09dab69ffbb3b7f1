"""The decoder under encryption: a block, and a whole model from one-hot tokens to logits. Runs under the engine.

``weights`` maps a name to a secret array: those of a block are ``q_weight`` ... ``down_bias``, and a model has
``embedding`` [vocab_size, n_embd], ``positions`` [T, n_embd], ``blocks.0.q_weight`` ..., ``final_gain`` ... and
``unembedding`` [n_embd, vocab_size]. Linear maps are [n_in, n_out]. ``config`` is the JSON that
``normfree_private.export`` writes; ``public`` holds the rotary tables.
"""

import jax.numpy as jnp
import operations


def norm(x, kind, weights, name, config):
    """The norm whose arrays are called ``{name}_gain`` and so on."""
    gain, bias = weights.get(f"{name}_gain"), weights.get(f"{name}_bias")
    if kind == "none":
        return x
    if kind == "layernorm":
        return operations.layernorm(x, gain, bias, eps=config["norm_eps"])
    if kind == "rmsnorm":
        return operations.rmsnorm(x, gain, eps=config["norm_eps"])
    if kind == "dyt":
        return operations.dyt(x, weights[f"{name}_alpha"], gain, bias)
    return operations.constant_scaling(x, gain, bias, is_centred=config["norm_is_centered"])


def attention(x, value_input, weights, config, public):
    """Multi-head causal attention, [T, n_embd] to [T, n_embd]."""

    def heads(read, name):
        y = operations.linear(read, weights[f"{name}_weight"], weights.get(f"{name}_bias"))
        return y.reshape(y.shape[0], -1, config["head_dim"]).transpose(1, 0, 2)

    query, key, value = heads(x, "q"), heads(x, "k"), heads(value_input, "v")
    if "cos" in public:
        query, key = (operations.rotary(each, public["cos"], public["sin"]) for each in (query, key))
    groups = config["n_head"] // config["n_kv_head"]
    key, value = jnp.repeat(key, groups, axis=0), jnp.repeat(value, groups, axis=0)
    shares = operations.softmax(operations.attention_scores(query, key))
    joined = operations.attention_output(shares, value).transpose(1, 0, 2).reshape(x.shape[0], -1)
    return operations.linear(joined, weights["o_weight"], weights.get("o_bias"))


def activation(x, name, weights, config):
    if name == "leaky_relu":
        return operations.leaky_relu(x, negative_slope=config["negative_slope"])
    if name == "learnable_leaky_relu":
        return operations.learnable_leaky_relu(x, weights["negative_slope"])
    return operations.OPERATIONS[name](x)


def feed_forward(x, activation_name, weights, config):
    up = operations.linear(x, weights["up_weight"], weights.get("up_bias"))
    if config["ffn"] == "gated":
        gate = operations.linear(x, weights["gate_weight"], weights.get("gate_bias"))
        hidden = operations.multiply(activation(gate, activation_name, weights, config), up)
    else:
        hidden = activation(up, activation_name, weights, config)
    return operations.linear(hidden, weights["down_weight"], weights.get("down_bias"))


def block(x, layer, weights, config, public):
    """One block, [T, n_embd] to [T, n_embd]."""

    def normed(y, name):
        return norm(y, config["norm"], weights, name, config)

    def attend(y, value_input):
        return attention(y, value_input, weights, config, public)

    def feed(y):
        return feed_forward(y, config["activations"][layer], weights, config)

    if config["norm_placement"] == "post":
        h = normed(x + attend(x, x), "attention_norm")
        return normed(h + feed(h), "ffn_norm")
    read = normed(x, "attention_norm")
    # A constant std is one for queries and keys, and another for values.
    value_input = normed(x, "value_norm") if config["norm"] == "constant_scaling" else read
    if config["parallel_residual"]:
        return x + attend(read, value_input) + feed(normed(x, "ffn_norm"))
    h = x + attend(read, value_input)
    return h + feed(normed(h, "ffn_norm"))


def model(one_hot, weights, config, public):
    """Logits [T, vocab_size] of tokens as rows of zeros and one one, [T, vocab_size]."""
    x = operations.linear(one_hot, weights["embedding"])
    if "positions" in weights:
        x = x + weights["positions"]
    for layer in range(config["n_layer"]):
        prefix = f"blocks.{layer}."
        own = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        x = block(x, layer, own, config, public)
    x = norm(x, config["final_norm"], weights, "final", config)
    return operations.linear(x, weights["unembedding"], weights.get("unembedding_bias"))
