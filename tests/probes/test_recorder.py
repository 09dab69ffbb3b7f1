"""The entropies of one forward pass, against attention weights that are materialised in float64, and their gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.errors import InputError
from normfree.probes import EntropyRecorder

from .small_models import build


def tiny_model(**options: Any) -> NormfreeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 32,
        "n_positions": 12,
        "initializer_range": 0.15,
    }
    return NormfreeForCausalLM(NormfreeConfig(**{**sizes, "norm": "none", "activation": "relu", **options}))


class MaterialisedAttention:
    """Causal softmax attention that writes the T × T matrix down, in the dtype it gets; it replaces the eager one."""

    def __init__(self) -> None:
        self.entropies: list[torch.Tensor] = []

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        p = scores.softmax(dim=-1)
        log_p = p.masked_fill(hidden, 1.0).log()
        self.entropies.append(-(p * log_p).sum(dim=-1).mean(dim=-1))
        return (p @ value).transpose(1, 2), None


@pytest.fixture
def materialised(monkeypatch: pytest.MonkeyPatch) -> MaterialisedAttention:
    attention = MaterialisedAttention()
    monkeypatch.setattr("normfree.modeling.attention.eager_attention_forward", attention)
    return attention


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "rotary", "n_kv_head": 2}, {"norm": "layernorm", "attention_bias": "qk"}],
    ids=["learned", "rotary-grouped", "layernorm"],
)
def test_entropy_and_its_gradient_are_those_of_the_materialised_softmax(
    options: dict[str, object], materialised: MaterialisedAttention
) -> None:
    model = tiny_model(**options)
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(0, 50, (5, 12))
    weighting = torch.randn(5, 3, 4)

    with EntropyRecorder(model) as recorded:
        model(tokens)
    entropy = recorded.per_head()
    exact.set_attn_implementation("eager")
    exact(tokens)
    expected = torch.stack(materialised.entropies, dim=1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)

    (entropy * weighting).sum().backward()
    (expected * weighting.double()).sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    references = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}
    assert ours.keys() == references.keys()
    whole = torch.stack([reference.norm() for reference in references.values()]).norm()
    for name, reference in references.items():
        # The softmax does not see a bias that all keys share: its gradient is 0.
        scale = whole if name.endswith("k_proj.bias") else reference.norm()
        error = (ours[name].double() - reference).norm() / scale
        assert error <= 1e-5, (name, error)


def test_gradients_are_the_same_under_gradient_checkpointing() -> None:
    tokens = torch.randint(0, 50, (2, 12))
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model().train()
        if is_checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with EntropyRecorder(model) as recorded:
            loss = model(tokens, labels=tokens).loss
        (loss + recorded.per_head().square().mean()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


def test_only_the_given_model_is_recorded() -> None:
    model, other = tiny_model(), build("gpt2")
    tokens = torch.randint(0, 50, (2, 12))
    with EntropyRecorder(model) as recorded:
        model(tokens)
        before = recorded.per_head()
        other(tokens)
    assert torch.equal(before, recorded.per_head())
    assert before.shape == (2, 3, 4)


def test_a_non_finite_score_makes_its_head_nan() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.blocks[1].attention.q_proj.weight[8:16] = torch.nan
    tokens = torch.randint(0, 50, (2, 12))
    with EntropyRecorder(model) as recorded, torch.no_grad():
        model(tokens)
    is_nan = recorded.per_head().isnan()
    assert is_nan[:, 1, 1].all()
    assert not is_nan[:, 0].any()
    assert not is_nan[:, 1, 0].any()


def test_attention_that_did_not_run_is_named() -> None:
    model = tiny_model()
    with EntropyRecorder(model) as recorded:
        pass
    with pytest.raises(
        InputError, match=r"entropy of model\.blocks\.0\.attention cannot be read: no forward pass of the model"
    ):
        recorded.per_head()
    with pytest.raises(InputError, match="has no attention module"):
        EntropyRecorder(nn.Linear(2, 2))
