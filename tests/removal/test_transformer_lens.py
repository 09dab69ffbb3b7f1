"""The stock export in TransformerLens (4.0 and later), a tool that knows nothing of ours. The tests do not need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normfree import NormfreeForCausalLM, remove_norms
from normfree.removal import to_stock

from .models import constant_std_of, tokens

pytest.importorskip("transformer_lens")


@pytest.fixture
def model() -> NormfreeForCausalLM:
    return constant_std_of("gpt2")


@pytest.fixture
def bridge(model: NormfreeForCausalLM, tmp_path: Path) -> Any:
    """The exported folder, as its users load it; it has no tokenizer here."""
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    to_stock(model).save_pretrained(tmp_path / "stock")
    return TransformerBridge.boot_transformers(str(tmp_path / "stock"), device="cpu")


def test_the_logits_are_those_of_the_model(model: NormfreeForCausalLM, bridge: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens()), model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_residual_stream_is_that_of_the_folded_model(model: NormfreeForCausalLM, bridge: Any) -> None:
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens())
        ours = remove_norms(model)(tokens(), output_hidden_states=True).hidden_states
    for layer in range(model.config.n_layer):
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_pre"], ours[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("processing", [True, False])
def test_compatibility_mode_keeps_the_predictions(model: NormfreeForCausalLM, bridge: Any, processing: bool) -> None:
    """With its weight processing, which folds gains and biases and centres what is written and the unembedding."""
    bridge.enable_compatibility_mode(no_processing=not processing)
    with torch.no_grad():
        theirs, ours = (each.log_softmax(-1) for each in (bridge(tokens()), model(tokens()).logits))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
