"""The probe reads the scores that attention uses where queries and keys are normalized: against eager weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.probes import EntropyProbe


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "rmsnorm"},
        {"qk_norm": "layernorm", "norm": "none"},
        {"norm_placement": "hybrid"},
        {"norm_placement": "hybrid_star", "norm": "dyt"},
    ],
    ids=str,
)
@torch.no_grad()
def test_entropy_is_that_of_the_eager_weights(options: dict[str, Any], implementation: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "n_positions": 16,
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 32,
        "n_kv_head": 2,
    }
    model = NormfreeForCausalLM(NormfreeConfig(**sizes, position="rotary", initializer_range=0.5, **options)).eval()
    for name, parameter in model.named_parameters():
        if ".q_norm.weight" in name or ".k_norm.weight" in name:
            parameter += torch.rand_like(parameter)  # gains that the probe would miss if it read the projections
    ids = torch.randint(50, (2, 13))
    model.set_attn_implementation("eager")
    p = np.stack([each.double().numpy() for each in model(ids, output_attentions=True).attentions])
    expected = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1).mean((1, 3))
    model.set_attn_implementation(implementation)
    with EntropyProbe(model) as probe:
        model(ids)
    assert probe.unreadable == {}
    np.testing.assert_allclose(probe.per_head().numpy(), expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.01, "all heads alike would show nothing"
