"""Blocks that read more of one another than the residual stream, wherever in the model they are."""

from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from normfree.errors import InputError
from normfree.interpret import measure_depth, prune_layers
from normfree.interpret.depth.block_calls import check_independence, record
from tests.interpret.depth.models import GROUPED, N_LAYER, STOCK, VOCAB_SIZE, ours, stock, tokens

T = 8


def shared_keys(n_shared, n_layer):
    """A Gemma 4 whose last ``n_shared`` layers read keys and values of earlier ones."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **GROUPED,
        "num_hidden_layers": n_layer,
        "head_dim": 4,
        "global_head_dim": 4,
        "sliding_window": 4,
    }
    small: dict[str, Any] = {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "initializer_range": 0.2,
    }
    kinds = ["sliding_attention", "full_attention"] * (n_layer // 2)
    config = Gemma4TextConfig(**sizes, **small, layer_types=kinds, num_kv_shared_layers=n_shared)
    return Gemma4ForCausalLM(config).eval()


def left_behind(writer, reader, scale=1e-3):
    """A Llama in which block ``reader`` adds what block ``writer`` left in a module: it outlives the pass."""
    model = stock("llama")
    layers = model.model.layers
    layers[writer].mlp.register_forward_hook(lambda module, inputs, output: setattr(model, "left", output))
    layers[reader].mlp.register_forward_hook(lambda module, inputs, output: output + scale * model.left)
    return model


def across_layers(writer, reader):
    """A GPT-2 whose block ``reader``, or final norm, reads the stream after ``writer`` as well (DenseFormer, U-Net)."""
    model = stock("gpt2")
    streams: dict[Any, Any] = {}
    model.transformer.h[writer].register_forward_hook(lambda module, inputs, output: streams.update(kept=output))
    module = model.transformer.ln_f if reader == N_LAYER else model.transformer.h[reader]
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1 * streams["kept"], *inputs[1:]))
    return model


@torch.no_grad()
def check(model):
    check_independence(record(model, tokens(2, T)))


@pytest.mark.parametrize("name", STOCK)
def test_stock_blocks_are_independent(name):
    check(stock(name))
    check(stock(name, initializer_range=0.02).bfloat16())


@pytest.mark.parametrize("n_shared", [1, 2, 3, 4])
@pytest.mark.parametrize("drop", [[0], [5]])
def test_shared_keys_and_values_are_refused_in_whichever_layers_they_are(n_shared, drop):
    model = shared_keys(n_shared, n_layer=6)
    with pytest.raises(InputError, match=r"model.layers.5 of Gemma4ForCausalLM reads more of other blocks") as error:
        measure_depth(model, tokens(2, T), n_probe=2)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="reads more of other blocks"):
        prune_layers(model, drop)


def test_without_shared_keys_the_same_architecture_is_measured():
    model = shared_keys(0, n_layer=6)
    assert len(measure_depth(model, tokens(2, T), n_probe=2).skipped_layers) == 6


@pytest.mark.parametrize(("writer", "reader"), [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)])
def test_state_that_outlives_a_pass_is_no_independence(writer, reader):
    with pytest.raises(InputError, match=rf"model.layers.{reader} of LlamaForCausalLM reads more"):
        check(left_behind(writer, reader))


def test_the_same_token_throughout_hides_no_state():
    with torch.no_grad():
        recorded = record(left_behind(0, 3), torch.full((2, T), 7))
    with pytest.raises(InputError, match=r"model.layers.3 of LlamaForCausalLM reads more"):
        check_independence(recorded)


def test_a_dependence_in_later_sequences_only_is_found():
    model = stock("llama")
    layers = model.model.layers
    layers[3].mlp.register_forward_hook(lambda module, inputs, output: setattr(model, "left", output))

    def read(module, inputs, output):
        return output + model.left if len(output) == 1 else output

    layers[4].mlp.register_forward_hook(read)
    with pytest.raises(InputError, match=r"model.layers.4 of LlamaForCausalLM reads more"):
        measure_depth(model, tokens(3, T), n_probe=2, batch_size=2)


@pytest.mark.parametrize(("writer", "reader"), [(0, 2), (1, 4), (2, 4)])
def test_connections_across_layers_are_refused(writer, reader):
    with pytest.raises(InputError, match=rf"transformer.h.{reader} of GPT2LMHeadModel does not read the residual"):
        check(across_layers(writer, reader))


@pytest.mark.parametrize("writer", [0, 2, 3])
def test_a_readout_of_several_layers_is_refused(writer):
    with pytest.raises(InputError, match="the readout of GPT2LMHeadModel reads more"):
        check(across_layers(writer, N_LAYER))


def test_a_stream_that_is_changed_between_blocks_is_refused():
    model = stock("llama")
    model.model.layers[4].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))
    with pytest.raises(InputError, match=r"model.layers.4 of LlamaForCausalLM does not read the residual stream as"):
        check(model)


@pytest.mark.parametrize("error", [AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError])
def test_whatever_a_block_raises_for_want_of_another_is_a_dependence(error):
    model = stock("llama")
    layers = model.model.layers
    model.register_forward_pre_hook(lambda module, inputs: setattr(model, "ran", set()))
    layers[3].mlp.register_forward_hook(lambda module, inputs, output: model.ran.add(3))

    def read(module, inputs, output):
        if 3 not in getattr(model, "ran", {3}):
            raise error("no such state")

    layers[4].mlp.register_forward_hook(read)
    model.model.register_forward_pre_hook(lambda module, inputs: setattr(model, "ran", set()))
    with pytest.raises(InputError, match=r"reads more of other blocks"):
        check(model)


def test_ours_with_one_slope_for_all_layers_is_independent():
    check(ours(activation="learnable_leaky_relu", slope_sharing="global", norm="none", final_norm="none"))


def test_options_that_few_tokens_do_not_show_stay_with_their_layers():
    model = stock("gpt2")
    model.transformer.h[3].attn.window = 512
    with pytest.raises(InputError, match=r"layer 3 of GPT2LMHeadModel has attn.window 512, and None as layer 2"):
        prune_layers(model, [1])
    assert prune_layers(model, [3]).config.n_layer == N_LAYER - 1
