"""Converted models under encryption: described for the engine, or refused by the name of the option."""

from __future__ import annotations

import pytest

from normfree import from_hf
from normfree.errors import InputError
from normfree_private.export import engine_config
from tests.modeling.conversion.test_uses import MODELS, WINDOWS

NOT_ENCRYPTED = {
    **dict.fromkeys(("gemma2", "gemma3"), "norm_placement 'sandwich' has no encrypted counterpart"),
    **dict.fromkeys(WINDOWS, r"sliding_window \d has no encrypted counterpart"),
    "stablelm-qk": "qk_norm 'layernorm_per_head' has no encrypted counterpart",
    "olmo2": "norm_placement 'reordered' has no encrypted counterpart",
}


@pytest.mark.parametrize("name", MODELS)
def test_encryption_is_described_or_refused(name: str) -> None:
    config = from_hf(MODELS[name]()).config
    if name in NOT_ENCRYPTED:
        with pytest.raises(InputError, match=NOT_ENCRYPTED[name]):
            engine_config(config)
        return
    assert engine_config(config)["n_layer"] == 3
