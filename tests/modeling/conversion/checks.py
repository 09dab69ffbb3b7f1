"""What holds for every family: the converted model against Hugging Face's own.

A family's test file has one class derived from :class:`FamilyChecks`; ``conftest.py`` runs each test for each case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from normfree import NormfreeForCausalLM, from_hf
from normfree.errors import InputError
from normfree.modeling.cache_keyword import CACHE

VOCAB, LENGTH = 43, 12


def perturbed(model: PreTrainedModel) -> Any:
    """The model in evaluation mode, no bias zero, no gain one, attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rope(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def padding_mask(side: str) -> torch.Tensor:
    """Sequences of 12, 7 and 1 tokens, padded on one side."""
    lengths = torch.tensor([[LENGTH], [7], [1]])
    ascending = torch.arange(LENGTH).expand(3, -1)
    return ((ascending if side == "right" else ascending.flip(1)) < lengths).long()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class FamilyChecks:
    """Tests of one family.

    model_class, config_class: of transformers.
    sizes: options that every model of these tests has.
    cases: other options by name; "" has none.
    refused: options, and what the error says.
    kept_options: options of the same name on both sides.
    dropouts: options, and the embedding, attention and residual dropout that they become.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    sizes: ClassVar[dict[str, Any]] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    cases: ClassVar[dict[str, dict[str, Any]]]
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = []
    kept_options: ClassVar[tuple[str, ...]] = (
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
        "initializer_range",
    )
    dropouts: ClassVar[tuple[dict[str, Any], tuple[float, float, float]]] = (
        {"attention_dropout": 0.2},
        (0.0, 0.2, 0.0),
    )

    @classmethod
    def build(cls, **options: Any) -> Any:
        return perturbed(cls.model_class(cls.config_class(**{**cls.sizes, **options})))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @torch.no_grad()
    def test_same_logits(self, case: dict[str, Any], implementation: str) -> None:
        theirs = self.build(**case)
        theirs.set_attn_implementation(implementation)
        ours = from_hf(theirs)
        assert isinstance(ours, NormfreeForCausalLM)
        # GPT-J has no sdpa before transformers 5.24, and stays eager.
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        expected = theirs(tokens()).logits
        assert expected.std() > 0.1
        assert_same(ours(tokens()).logits, expected)
        for side in ("left", "right"):
            mask = padding_mask(side)
            kept = mask.bool()
            expected = theirs(tokens(), attention_mask=mask).logits[kept]
            assert_same(ours(tokens(), attention_mask=mask).logits[kept], expected)

    @torch.no_grad()
    def test_same_generation_with_and_without_cache(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for mask in (torch.ones(3, LENGTH, dtype=torch.long), padding_mask("left")):
            expected = theirs.generate(tokens(), attention_mask=mask, **options)
            for use_cache in (True, False):
                actual = ours.generate(tokens(), attention_mask=mask, use_cache=use_cache, **options)
                assert torch.equal(actual, expected)

    @torch.no_grad()
    def test_same_logits_token_by_token(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        caches: list[Any] = [None, None]
        for step in tokens().split([5, *[1] * (LENGTH - 5)], dim=1):
            logits = []
            for i, model in enumerate((theirs, ours)):
                output = model(step, use_cache=True, **{CACHE: caches[i]})
                caches[i] = output[CACHE]
                logits.append(output.logits)
            assert_same(logits[1], logits[0])

    def test_same_loss_and_gradients(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        expected = theirs(tokens(), labels=tokens())
        actual = ours(tokens(), labels=tokens())
        torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-6)
        expected.loss.backward()
        actual.loss.backward()
        torch.testing.assert_close(
            ours.get_input_embeddings().weight.grad, theirs.get_input_embeddings().weight.grad, rtol=0, atol=1e-6
        )

    def test_weights_are_copies_and_complete(self, case: dict[str, Any]) -> None:
        theirs = self.build(**case)
        before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        ours = from_hf(theirs)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        storages = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
        assert not storages & {p.untyped_storage().data_ptr() for p in ours.parameters()}
        tied = ours.lm_head.weight is ours.model.embed_tokens.weight
        assert tied == ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.fill_(torch.nan)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, before[name])

    @torch.no_grad()
    def test_save_and_load_keep_the_logits(self, case: dict[str, Any], tmp_path: Path) -> None:
        theirs = self.build(**case)
        ours = from_hf(theirs)
        ours.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, NormfreeForCausalLM)
        assert loaded.state_dict().keys() == ours.state_dict().keys()
        assert_same(loaded(tokens()).logits, theirs(tokens()).logits)

    def test_mode_dtype_and_generation_config_are_kept(self) -> None:
        theirs = self.build().to(torch.bfloat16).train()
        theirs.generation_config.top_k = 7
        ours = from_hf(theirs)
        assert ours.training
        assert all(module.training for module in ours.modules())
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
        assert ours.dtype == ours.config.dtype == torch.bfloat16
        assert ours.generation_config == theirs.generation_config
        assert ours.generation_config is not theirs.generation_config
        for option in self.kept_options:
            assert getattr(ours.config, option) == getattr(theirs.config, option)
        assert not from_hf(theirs.eval()).training

    @torch.no_grad()
    def test_rotary_frequencies_rounded_by_a_cast_are_kept(self) -> None:
        theirs = self.build().to(torch.bfloat16).float()
        ours = from_hf(theirs)
        assert_same(ours(tokens()).logits, theirs(tokens()).logits)

    def test_dropouts_act_in_the_same_places(self) -> None:
        """With one seed both draw the same masks in the same order, so the logits agree in training mode too."""
        options, expected = self.dropouts
        theirs = self.build(**options)
        ours = from_hf(theirs.train())
        config = ours.config
        assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == expected
        torch.manual_seed(3)
        expected_logits = theirs(tokens()).logits
        torch.manual_seed(3)
        assert_same(ours(tokens()).logits, expected_logits)
        torch.manual_seed(4)
        assert not torch.allclose(ours(tokens()).logits, expected_logits, atol=1e-2)

    def test_options_without_counterpart_are_refused_by_name(self) -> None:
        for options, message in self.refused:
            with pytest.raises(InputError, match=message) as error:
                from_hf(self.build(**options))
            assert "\n" not in str(error.value)
