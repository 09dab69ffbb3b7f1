"""``from_hf`` where it does not depend on the family: what it refuses, and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.nn.utils.prune
import torchao
import torchao.quantization
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from normfree import NormfreeConfig, from_hf
from normfree.errors import InputError
from normfree.modeling.activations import ACTIVATIONS
from normfree.modeling.conversion.family import HF_ACTIVATIONS
from tests.modeling.conversion.checks import VOCAB, assert_same, tokens
from tests.modeling.conversion.test_gpt2 import TestGPT2 as FamilyGPT2
from tests.modeling.conversion.test_gpt_neox import TestGPTNeoX as FamilyGPTNeoX
from tests.modeling.conversion.test_llama import TestLlama as FamilyLlama


def gpt2() -> GPT2LMHeadModel:
    return FamilyGPT2.build()


def gpt_neox() -> GPTNeoXForCausalLM:
    return FamilyGPTNeoX.build()


def llama() -> LlamaForCausalLM:
    return FamilyLlama.build()


def test_conversion_draws_no_random_numbers() -> None:
    theirs = gpt2()
    state = torch.get_rng_state()
    from_hf(theirs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(HF_ACTIVATIONS))
def test_activation_names_stand_for_the_same_function(name: str) -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float32)
    config = NormfreeConfig(activation=HF_ACTIVATIONS[name])
    ours = ACTIVATIONS[HF_ACTIVATIONS[name]](config)
    torch.testing.assert_close(ours(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


def test_other_classes_are_refused_by_name() -> None:
    sizes: dict[str, Any] = {"d_model": 8, "decoder_attention_heads": 2, "decoder_layers": 1, "decoder_ffn_dim": 8}
    bart = BartForCausalLM(BartConfig(vocab_size=8, **sizes))
    allowed = "allowed: .*GPT2LMHeadModel, .*LlamaForCausalLM, MistralForCausalLM, .*Qwen3ForCausalLM"
    with pytest.raises(InputError, match=f"cannot convert a BartForCausalLM; {allowed}"):
        from_hf(bart)
    with pytest.raises(InputError, match=f"cannot convert a GPT2Model; {allowed}"):
        from_hf(gpt2().transformer)
    with pytest.raises(InputError, match="cannot convert a NormfreeForCausalLM"):
        from_hf(from_hf(gpt2()))

    class ChangedLlama(LlamaForCausalLM):
        """A subclass may compute anything."""

    changed = ChangedLlama(llama().config)
    with pytest.raises(InputError, match="cannot convert a ChangedLlama"):
        from_hf(changed)
    ChangedLlama.__name__ = "LlamaForCausalLM"
    with pytest.raises(InputError, match=f"cannot convert a LlamaForCausalLM of {__name__}"):
        from_hf(changed)


def with_adapter() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[1].mlp.adapter = torch.nn.Linear(4, 4)
    return model


def with_biased_head() -> GPT2LMHeadModel:
    model = gpt2()
    model.lm_head = torch.nn.Linear(16, VOCAB)
    return model


def with_two_dtypes() -> GPTNeoXForCausalLM:
    model = gpt_neox()
    model.gpt_neox.final_layer_norm.to(torch.bfloat16)
    return model


def without_weights() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(llama().config)


def offloaded() -> LlamaForCausalLM:
    return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))


def partly_offloaded(tmp_path: Path) -> LlamaForCausalLM:
    model = llama()
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(
        model, {**places, "model.rotary_emb": "cpu"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )


def with_lora(rank: int, model: PreTrainedModel, target: str) -> peft.PeftModel:
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=[target]))


def with_injected_lora(rank: int) -> GPT2LMHeadModel:
    model = gpt2()
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=["c_attn"]), model)
    return model


def by_torchao(configuration: Any) -> LlamaForCausalLM:
    model = llama()
    torchao.quantization.quantize_(model, configuration)
    return model


def by_torch() -> LlamaForCausalLM:
    return torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)


def said_to_be_quantized(model: PreTrainedModel) -> PreTrainedModel:
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return model


def with_layer_compiled() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def with_pruned_weight() -> LlamaForCausalLM:
    model = llama()
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    return model


def with_weight_norm() -> GPTNeoXForCausalLM:
    model = gpt_neox()
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("gpt_neox.layers.0.attention.query_key_value"))
    return model


def with_other_activation() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[2].mlp.act_fn = torch.nn.Tanh()
    return model


def with_fewer_layers() -> LlamaForCausalLM:
    model = llama()
    model.model.layers = model.model.layers[:2]
    return model


def with_longer_embedding() -> LlamaForCausalLM:
    model = llama()
    model.model.embed_tokens = torch.nn.Embedding(VOCAB + 3, 32)
    return model


NOT_THEIR_OWN: dict[str, tuple[Any, str]] = {
    "adapter": (
        with_adapter,
        r"no module at model\.layers\.1\.mlp\.adapter, and the model torch\.nn.*Linear; merge adapters",
    ),
    "biased head": (with_biased_head, r"weights .* are not those that its class makes .*: lm_head\.bias"),
    "two dtypes": (with_two_dtypes, r"one dtype on one device; it has torch\.bfloat16, torch\.float32 on cpu"),
    "meta": (without_weights, r"in memory, .* it has torch\.float32 on meta"),
    "offloaded": (offloaded, r"in memory, .* it has torch\.float32 on meta"),
    "PEFT": (lambda: with_lora(4, llama(), "q_proj"), r"cannot convert a PeftModel; .* model\.merge_and_unload\(\)"),
    "injected LoRA": (
        lambda: with_injected_lora(8),
        r"has Conv1D at transformer\.h\.0\.attn\.c_attn, and the model peft\..*Linear; merge adapters",
    ),
    "injected LoRA of rank 1": (lambda: with_injected_lora(1), "has Conv1D at .*c_attn, and the model peft"),
    "torchao int8": (
        lambda: by_torchao(torchao.quantization.Int8WeightOnlyConfig()),
        r"needs plain tensors, and model\.layers\.0\.self_attn\.q_proj\.weight .* is of type Int8Tensor \(quantized",
    ),
    "torchao int8 activations": (
        lambda: by_torchao(torchao.quantization.Int8DynamicActivationInt8WeightConfig()),
        r"needs plain tensors, and model\.layers\.0\.self_attn\.q_proj\.weight .* \(quantized",
    ),
    "torch int8": (
        by_torch,
        r"has torch\.nn\.modules\.linear\.Linear at .*, and the model torch\.ao\.nn\.quantized\.dynamic\..*Linear",
    ),
    "bitsandbytes": (lambda: said_to_be_quantized(llama()), r"cannot convert a quantized LlamaForCausalLM \(bitsand"),
    "compiled": (lambda: torch.compile(llama()), r"cannot convert a OptimizedModule; .* model\._orig_mod"),
    "compiled layer": (
        with_layer_compiled,
        r"has LlamaDecoderLayer at model\.layers\.0, and the model .*OptimizedModule",
    ),
    "DataParallel": (lambda: torch.nn.DataParallel(llama()), r"cannot convert a DataParallel; .* model\.module"),
    "pruned": (with_pruned_weight, r"are not those that its class makes .*: .*up_proj\.weight, .*weight_mask, "),
    "weight norm": (with_weight_norm, r"has torch.*Linear at .*query_key_value, and the model .*ParametrizedLinear"),
    "other activation": (with_other_activation, r"has .*SiLU.* at model\.layers\.2\.mlp\.act_fn, and the model .*Tanh"),
    "fewer layers": (with_fewer_layers, r"has LlamaDecoderLayer at model\.layers\.2, and the model no module"),
    "longer embedding": (with_longer_embedding, r"are not those that its class makes .*: model\.embed_tokens\.weight"),
    "no model": (lambda: None, "cannot convert a NoneType; allowed"),
}


@pytest.mark.parametrize("name", NOT_THEIR_OWN)
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_not_their_class_as_built_are_refused(name: str) -> None:
    build, message = NOT_THEIR_OWN[name]
    with pytest.raises(InputError, match=message) as error:
        from_hf(build())
    assert "\n" not in str(error.value)


def test_models_with_layers_on_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in memory"):
        from_hf(partly_offloaded(tmp_path))


def test_merged_adapters_and_models_compiled_in_place_are_converted() -> None:
    adapted = with_lora(4, llama(), "q_proj")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = adapted(tokens()).logits
    merged = adapted.merge_and_unload()
    assert_same(from_hf(merged)(tokens()).logits, expected)
    compiled = gpt2()
    expected = compiled(tokens()).logits
    compiled.compile()
    assert_same(from_hf(compiled)(tokens()).logits, expected)


def test_embeddings_untied_by_hand_stay_untied() -> None:
    theirs = gpt2()
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone() + 1)
    ours = from_hf(theirs)
    assert not ours.config.tie_word_embeddings
    assert_same(ours(tokens()).logits, theirs(tokens()).logits)
