import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    PreTrainedTokenizerFast,
    ZambaConfig,
    ZambaForCausalLM,
)

from normfree.errors import InputError
from normfree.interpret import export_pruned, prune_layers
from normfree.modeling.decoder_blocks import decoder_blocks
from tests.coverage.tiny_models import tiny_model
from tests.interpret.depth.models import N_LAYER, STOCK, ours, stock, tokens

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def logits(model, text):
    with torch.no_grad():
        return model(input_ids=text, use_cache=False).logits


def skipped(model, blocks, layers, text):
    """The logits with hooks that put each of these blocks' input in place of what it puts out."""
    hooks = [blocks[layer].register_forward_hook(lambda module, inputs, output: inputs[0]) for layer in layers]
    found = logits(model, text)
    for hook in hooks:
        hook.remove()
    return found


def assert_generates_with_its_cache(model):
    text = tokens(1, 5, seed=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(text, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (1, 11)
    torch.testing.assert_close(cached, plain, rtol=0, atol=0)


def refused(model, layers, folder, says):
    with pytest.raises(InputError, match=says) as error:
        export_pruned(model, layers, folder / "pruned", source="here")
    assert "\n" not in str(error.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("layers", [[0, 3], [4]])
def test_stock_models_reload_as_the_model_with_these_layers_skipped(name, layers, tmp_path):
    model, text = stock(name), tokens(3, 12)
    before = logits(model, text)
    export_pruned(model, layers, tmp_path / "pruned", source="here")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    blocks = model.get_submodule(BLOCKS.get(name, "model.layers"))
    torch.testing.assert_close(logits(reloaded, text), skipped(model, blocks, layers, text), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, text), before, rtol=0, atol=0)
    assert reloaded.config.num_hidden_layers == N_LAYER - len(layers)
    assert_generates_with_its_cache(reloaded)


def test_the_kinds_of_layers_stay_with_their_layers():
    model = stock("qwen3")
    assert model.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 2
    assert prune_layers(model, [0, 1]).config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert len(model.config.layer_types) == N_LAYER
    hybrid = ours(activation=["gelu", "relu", "silu", "gelu", "relu"])
    assert prune_layers(hybrid, [1, 3]).config.activation == ["gelu", "silu", "relu"]


TWO_ROPES = {
    "position": "rotary",
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
    "rope_parameters": {"sliding_attention": {"rope_theta": 2.0}, "full_attention": {"rope_theta": 50.0}},
}
"""Without layers 0 and 3 no layer is sliding, and one set of rotary parameters is left."""


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [2]),
        ({"position": "rotary", "tie_word_embeddings": False}, [0, 1]),
        ({"activation": ["gelu", "relu", "silu", "gelu", "relu"]}, [1, 3]),
        ({"activation": "learnable_leaky_relu", "slope_sharing": "global", "norm": "none"}, [0]),
        ({"norm_placement": "post"}, [2]),
        ({"norm_placement": "mix", "n_post_layer": 2}, [0, 3]),
        ({"norm_placement": "hybrid_star"}, [1]),
        ({"norm": "layernorm_scaling"}, [3, 4]),
        (TWO_ROPES, [1, 2]),
        (TWO_ROPES, [0, 3]),
        ({"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "embedding_multiplier": 3.0}, [1, 2]),
    ],
)
def test_ours_reloads_as_the_model_with_these_layers_skipped(options, layers, tmp_path):
    model, text = ours(**options), tokens(3, 12)
    export_pruned(model, layers, tmp_path / "pruned", source="here")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    expected = skipped(model, model.model.blocks, layers, text)
    torch.testing.assert_close(logits(reloaded, text), expected, rtol=0, atol=1e-5)
    assert_generates_with_its_cache(reloaded)


def test_a_folder_has_weights_configuration_tokenizer_and_where_it_is_from(tmp_path):
    vocabulary = {f"word{i}": i for i in range(50)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")), unk_token="word0"
    )
    stock("llama").save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).eval()
    export_pruned(model, [3, 1], tmp_path / "new" / "pruned", source="there", tokenizer=tokenizer)
    folder = tmp_path / "new" / "pruned"
    assert [path.name for path in folder.parent.iterdir()] == ["pruned"]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert json.loads((folder / "pruning.json").read_text()) == {
        "source": "there",
        "n_layer": 5,
        "dropped_layers": [1, 3],
        "kept_layers": [0, 2, 4],
    }
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([], "cannot drop 0 of 5 layers; drop 1 to 4 of them"),
        ([0, 1, 2, 3, 4], "cannot drop 5 of 5 layers"),
        ([5], "there is no layer 5 to drop; the model has layers 0 to 4"),
        ([-1], "there is no layer -1 to drop"),
        ([2, 1, 2], "layer 2 is named twice"),
    ],
)
def test_layers_that_cannot_be_dropped(layers, says, tmp_path):
    refused(stock("gpt2"), layers, tmp_path, says)


@pytest.mark.parametrize(
    ("options", "layers", "says"),
    [
        ({"norm": "layernorm_scaling"}, [3], "scales by the index of the layer, and layer 4 would move"),
        ({"norm": "rmsnorm_scaling", "final_norm": "rmsnorm"}, [0], "'rmsnorm_scaling' scales by the index"),
        ({"norm_placement": "deepnorm"}, [4], "'deepnorm' scales by the number of layers; none can be dropped"),
        ({"norm_placement": "hybrid_star"}, [0], "'hybrid_star' has another kind of block first; keep layer 0"),
        ({"norm_placement": "mix", "n_post_layer": 1}, [0], "'mix' has at least one post-norm layer"),
    ],
)
def test_layers_of_ours_that_would_mean_something_else(options, layers, says, tmp_path):
    refused(ours(**options), layers, tmp_path, says)


def test_a_meaning_of_the_index_that_no_name_tells_is_found_by_the_logits(tmp_path):
    model = stock("gpt2", scale_attn_by_inverse_layer_idx=True)
    refused(model, [1], tmp_path, "what a layer does depends on its index")
    export_pruned(model, [3, 4], tmp_path / "pruned", source="here")


def test_the_decoder_of_an_architecture_with_an_encoder_has_its_own_number_of_layers():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "d_model": 16,
        "decoder_layers": 4,
        "encoder_layers": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 50,
    }
    inner: dict[str, Any] = {
        "decoder_ffn_dim": 24,
        "encoder_ffn_dim": 24,
        "max_position_embeddings": 32,
        "init_std": 0.2,
    }
    model = BartForCausalLM(BartConfig(**sizes, **inner, encoder_attention_heads=2)).eval()
    text = tokens(2, 12)
    expected = skipped(model, model.model.decoder.layers, [1, 3], text)
    torch.testing.assert_close(logits(prune_layers(model, [1, 3]), text), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", range(6))
def test_blocks_that_share_weights_are_left_out_where_the_others_make_a_model(layer):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    state: dict[str, Any] = {"mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2, "vocab_size": 50}
    kinds = ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"]
    model = ZambaForCausalLM(ZambaConfig(num_hidden_layers=6, layers_block_type=kinds, **sizes, **state)).eval()
    if kinds[layer] == "mamba":
        assert len(prune_layers(model, [layer]).model.layers) == 5
        return
    with pytest.raises(InputError, match=r"cannot be built of the layers that are left .*drop others") as error:
        prune_layers(model, [layer])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_configuration_that_allows_no_such_model_says_why_in_one_line(tmp_path, monkeypatch):
    model = stock("llama")

    def refuse(*arguments, **keywords):
        raise ValueError("the layer types\ndo not fit")

    monkeypatch.setattr(type(model.config), "from_dict", refuse)
    refused(
        model,
        [1],
        tmp_path,
        r"LlamaConfig allows no model of the layers that are left \(ValueError: the layer types do not fit",
    )


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        export_pruned(stock("gpt2"), [1], tmp_path / "pruned", source="here")
    assert [path.name for path in (tmp_path / "pruned").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("model_type", ["bart", "gemma3", "whisper", "got_ocr2", "zamba2"])
def test_decoders_of_larger_models_are_exported_without_their_last_layer(model_type, tmp_path):
    """Their configurations count other layers too: those of an encoder, of an image's tower."""
    model = tiny_model(model_type)
    text = tokens(2, 9)
    blocks = list(decoder_blocks(model).values())
    pruned = export_pruned(model, [len(blocks) - 1], tmp_path / "pruned", source="here")
    assert len(decoder_blocks(pruned)) == len(blocks) - 1
    expected = skipped(model, blocks, [len(blocks) - 1], text)
    torch.testing.assert_close(logits(pruned, text), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_a_class_that_allows_no_such_layers_is_refused(model_type, tmp_path):
    """Zamba's shared block is of its first hybrid layer; Zamba 2 looks layers up by their index."""
    refused(tiny_model(model_type), [1], tmp_path, "cannot be built of the layers|with its layers renumbered")
