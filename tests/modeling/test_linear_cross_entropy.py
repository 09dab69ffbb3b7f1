"""Linear cross-entropy in blocks against the definition in float64, with and without the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normfree import NormfreeConfig, NormfreeForCausalLM
from normfree.compiled import library_refuses
from normfree.modeling import linear_cross_entropy as module
from normfree.modeling.linear_cross_entropy import SoftTargets, linear_cross_entropy

HALF = (torch.bfloat16, torch.float16)
WIDTH = 7
"""Also the tokens of a block, so that there are several."""


@pytest.fixture(params=["kernel", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Losses by the compiled kernel, and by torch; both in several blocks."""
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 1)
    if request.param == "plain":
        monkeypatch.setattr(module, "library_refuses", lambda *_: "not here")
    elif library_refuses(module.NAME, module.INTERFACE) is not None:
        pytest.skip("the kernels are not compiled")
    return str(request.param)


def made_up(vocab_size: int, *, bias: bool = False, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor]:
    """hidden [3, 13, WIDTH], an unembedding, and labels of which some are not predicted."""
    torch.manual_seed(seed)
    unembedding = nn.Linear(WIDTH, vocab_size, bias=bias)
    nn.init.normal_(unembedding.weight)
    labels = torch.randint(0, vocab_size, (3, 13))
    labels[0, 4:9] = -100
    return torch.randn(3, 13, WIDTH, requires_grad=True), unembedding, labels


def whole_logits(hidden: Tensor, unembedding: nn.Linear, softcap: float | None) -> tuple[Tensor, Tensor, nn.Linear]:
    """Logits [batch, T - 1, vocab_size] in float64, and the copies of hidden and unembedding that they are made of."""
    wide = nn.Linear(WIDTH, unembedding.out_features, bias=unembedding.bias is not None).double()
    wide.load_state_dict(unembedding.state_dict())
    x = hidden.detach().double().requires_grad_()
    logits = wide(x)[:, :-1]
    return logits if softcap is None else softcap * torch.tanh(logits / softcap), x, wide


def oracle(
    hidden: Tensor, unembedding: nn.Linear, labels: Tensor, softcap: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Losses [batch, T - 1] and the gradients of their sum (hidden, weight, bias), in float64 with whole logits."""
    logits, x, wide = whole_logits(hidden, unembedding, softcap)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    losses.sum().backward()
    gradients = [x.grad, *(each.grad for each in wide.parameters())]
    return losses.detach(), [each for each in gradients if each is not None]


TEACHER_WIDTH = 11


def taught(
    vocab_size: int, form: str = "unembedding", *, softcap: float | None = None, share: float = 0.7, tau: float = 1.7
) -> tuple[SoftTargets, Tensor]:
    """A teacher for :func:`made_up`, and its logits [3, 13, vocab_size] in float64."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 13, TEACHER_WIDTH), torch.randn(vocab_size, TEACHER_WIDTH)
    bias = torch.randn(vocab_size)
    logits = hidden.double() @ weight.double().T + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if form == "logits":
        return SoftTargets(logits.float(), None, None, None, share, tau), logits
    return SoftTargets(hidden, weight, bias, softcap, share, tau), logits


def mixture(
    hidden: Tensor, unembedding: nn.Linear, labels: Tensor, teacher: SoftTargets, logits: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The mixed loss, each token's KL and the gradients of the loss, in float64 with whole logits."""
    own, x, wide = whole_logits(hidden, unembedding, softcap)
    log_p, log_q = ((each / teacher.temperature).log_softmax(-1) for each in (logits[:, :-1], own))
    p = log_p.exp()
    kls = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).where(labels[:, 1:] != -100, 0.0)
    losses = nn.functional.cross_entropy(own.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    total = (1 - teacher.share) * losses.sum() + teacher.share * teacher.temperature**2 * kls.sum()
    total.backward()
    gradients = [x.grad, *(each.grad for each in wide.parameters())]
    return total.detach(), kls.detach(), [each for each in gradients if each is not None]


def gradients_of(hidden: Tensor, unembedding: nn.Linear) -> list[Tensor]:
    return [each for each in (hidden.grad, *(p.grad for p in unembedding.parameters())) if each is not None]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("vocab_size", [5, 16, 1003])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_is_exact_to_rounding(way: str, vocab_size: int, softcap: float | None, bias: bool) -> None:
    hidden, unembedding, labels = made_up(vocab_size, bias=bias)
    expected, expected_gradients = oracle(hidden, unembedding, labels, softcap)
    total, losses, _ = linear_cross_entropy(hidden, unembedding, labels, softcap=softcap)
    total.backward()
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert all(map(lambda *pair: distance(*pair) < 2e-6, gradients_of(hidden, unembedding), expected_gradients))

    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_is_as_near_as_whole_logits_are(way: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden, unembedding, labels = made_up(1003, bias=True)
    expected, expected_gradients = oracle(hidden, unembedding, labels)
    with torch.autocast("cpu", dtype=dtype):
        total, *_ = linear_cross_entropy(hidden, unembedding, labels)
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-3)
    found = gradients_of(hidden, unembedding)
    assert all(each.dtype == torch.float32 for each in found)
    assert all(map(lambda *pair: distance(*pair) < tolerance, found, expected_gradients))


def test_fp16_gradients_survive_a_small_factor(way: str) -> None:
    """A mean over many tokens, and a loss scale, multiply gradients that are float32 by then."""
    hidden, unembedding, labels = made_up(1003)
    _, (of_hidden, of_weight) = oracle(hidden, unembedding, labels)
    with torch.autocast("cpu", dtype=torch.float16):
        total, *_ = linear_cross_entropy(hidden, unembedding, labels)
    (total * 1e-12).backward()
    assert hidden.grad is not None
    assert unembedding.weight.grad is not None
    assert distance(hidden.grad, of_hidden * 1e-12) < 2e-3
    assert distance(unembedding.weight.grad, of_weight * 1e-12) < 2e-3


def test_tied_weights_add_up(way: str) -> None:
    _, unembedding, labels = made_up(50)
    embedding = nn.Embedding(50, WIDTH)
    embedding.weight = unembedding.weight
    tokens = labels.clamp(min=0)
    linear_cross_entropy(embedding(tokens), unembedding, labels).total.backward()
    found = unembedding.weight.grad
    assert found is not None
    wide = unembedding.weight.detach().double().requires_grad_()
    logits = (wide[tokens] @ wide.T)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    assert wide.grad is not None
    assert distance(found, wide.grad) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("place", "value"), [(3, float("nan")), (40, float("inf")), (49, float("nan"))])
def test_nonfinite_logits_are_nonfinite_losses_of_their_tokens_only(
    way: str, dtype: torch.dtype, place: int, value: float
) -> None:
    hidden, unembedding, labels = made_up(50)
    with torch.no_grad():
        hidden[1, 2] = value if place % 2 else hidden[1, 2]
        unembedding.weight[place, 0] = 1.0
        hidden[1, 2, 0] = value
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        total, losses, _ = linear_cross_entropy(hidden, unembedding, labels)
    assert not losses[1, 2].isfinite()
    losses[1, 2] = 0
    assert losses.isfinite().all()
    assert not total.isfinite()
    total.backward()
    assert hidden.grad is not None
    assert not hidden.grad[1, 2].isfinite().any()
    assert hidden.grad[0].isfinite().all()


def test_minus_infinity_has_probability_zero(way: str) -> None:
    """A bias of −∞ takes a token out of the vocabulary."""
    hidden, unembedding, labels = made_up(50, bias=True)
    with torch.no_grad():
        unembedding.bias[7] = float("-inf")
    labels[labels == 7] = 8
    expected, (of_hidden, *_) = oracle(hidden, unembedding, labels)
    total, *_ = linear_cross_entropy(hidden, unembedding, labels)
    total.backward()
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-6)
    assert hidden.grad is not None
    assert distance(hidden.grad, of_hidden) < 2e-6


def test_nothing_to_predict(way: str) -> None:
    hidden, unembedding, labels = made_up(50)
    total, *_ = linear_cross_entropy(hidden, unembedding, torch.full_like(labels, -100))
    total.backward()
    assert total.item() == 0
    assert all((each == 0).all() for each in gradients_of(hidden, unembedding))


def test_frozen_weights_without_gradient(way: str) -> None:
    hidden, unembedding, labels = made_up(50)
    unembedding.requires_grad_(False)
    linear_cross_entropy(hidden, unembedding, labels).total.backward()
    assert hidden.grad is not None
    assert unembedding.weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, unembedding, labels).total.requires_grad


def test_no_gradients_are_made_where_none_is_asked_for(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, unembedding, labels = made_up(50)
    expected, _ = oracle(hidden, unembedding, labels)
    monkeypatch.setattr(module, "_Gradients", None)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, unembedding, labels).losses
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=2e-6)


def test_extreme_logits(way: str) -> None:
    """The largest logit is taken off first: neither 1e4 nor -1e4 overflows."""
    hidden, unembedding, labels = made_up(50)
    with torch.no_grad():
        unembedding.weight.mul_(1e4)
    expected, _ = oracle(hidden, unembedding, labels)
    losses = linear_cross_entropy(hidden, unembedding, labels).losses
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("vocab_size", [5, 16, 1003])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("form", ["unembedding", "logits"])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_soft_targets_are_exact_to_rounding(
    way: str, vocab_size: int, softcap: float | None, form: str, tau: float
) -> None:
    hidden, unembedding, labels = made_up(vocab_size, bias=True)
    teacher, logits = taught(vocab_size, form, softcap=softcap, tau=tau)
    expected, kls, expected_gradients = mixture(hidden, unembedding, labels, teacher, logits, softcap)
    found = linear_cross_entropy(hidden, unembedding, labels, softcap=softcap, soft_targets=teacher)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found.divergences.double(), kls, rtol=1e-5, atol=1e-5)
    losses, _ = oracle(hidden, unembedding, labels, softcap)
    torch.testing.assert_close(found.losses.double(), losses, rtol=1e-5, atol=2e-6)
    assert all(map(lambda *pair: distance(*pair) < 3e-6, gradients_of(hidden, unembedding), expected_gradients))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
def test_soft_targets_in_half_precision_survive_a_small_factor(way: str, dtype: torch.dtype, tolerance: float) -> None:
    hidden, unembedding, labels = made_up(1003)
    teacher, logits = taught(1003)
    expected, _, expected_gradients = mixture(hidden, unembedding, labels, teacher, logits, None)
    with torch.autocast("cpu", dtype=dtype):
        total = linear_cross_entropy(hidden, unembedding, labels, soft_targets=teacher).total
    assert total.item() == pytest.approx(expected.item(), rel=2e-3)
    (total * 1e-12).backward()
    for found, gradient in zip(gradients_of(hidden, unembedding), expected_gradients, strict=True):
        assert found.dtype == torch.float32
        assert distance(found * 1e12, gradient) < tolerance


def test_soft_targets_of_impossible_tokens(way: str) -> None:
    """−∞ in both models' biases is no information; in the student's alone an infinite divergence."""
    hidden, unembedding, labels = made_up(50, bias=True)
    teacher, logits = taught(50)
    with torch.no_grad():
        unembedding.bias[7] = float("-inf")
    labels[labels == 7] = 8
    is_predicted = labels[:, 1:] != -100
    found = linear_cross_entropy(hidden, unembedding, labels, soft_targets=teacher)
    assert found.divergences[is_predicted].eq(float("inf")).all()
    assert not found.divergences[~is_predicted].any()
    assert teacher.bias is not None
    teacher.bias[7] = logits[..., 7] = float("-inf")
    expected, _, (of_hidden, *_) = mixture(hidden, unembedding, labels, teacher, logits, None)
    found = linear_cross_entropy(hidden, unembedding, labels, soft_targets=teacher)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert hidden.grad is not None
    assert distance(hidden.grad, of_hidden) < 3e-6


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_in_either_model_is_a_nan_of_its_token_only(way: str, whose: str) -> None:
    hidden, unembedding, labels = made_up(50)
    teacher, _ = taught(50)
    with torch.no_grad():
        (hidden if whose == "student" else teacher.hidden)[1, 2, 0] = float("nan")
    found = linear_cross_entropy(hidden, unembedding, labels, soft_targets=teacher)
    assert found.divergences[1, 2].isnan()
    assert found.total.isnan()
    found.divergences[1, 2] = 0
    assert found.divergences.isfinite().all()
    found.total.backward()
    assert hidden.grad is not None
    assert hidden.grad[1, 2].isnan().all()
    assert hidden.grad[0].isfinite().all()


def test_a_teacher_that_is_the_student_teaches_nothing(way: str) -> None:
    hidden, unembedding, labels = made_up(1003)
    same = SoftTargets(hidden.detach(), unembedding.weight.detach(), None, None, 1.0, 2.0)
    found = linear_cross_entropy(hidden, unembedding, labels, soft_targets=same)
    found.total.backward()
    assert found.total.item() == pytest.approx(0, abs=1e-5)
    assert max(float(each.abs().max()) for each in gradients_of(hidden, unembedding)) < 1e-5


@pytest.mark.skipif(library_refuses(module.NAME, module.INTERFACE) is not None, reason="the kernels are not compiled")
@settings(max_examples=60, deadline=None)
@given(
    n_row=st.integers(1, 5),
    vocab_size=st.integers(1, 200),
    scale=st.floats(0.01, 30),
    dtype=st.sampled_from([torch.float32, *HALF]),
    seed=st.integers(0, 2**16),
)
def test_kernel_is_the_plain_way(n_row: int, vocab_size: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n_row, vocab_size, generator=generator) * scale).to(dtype)
    targets = torch.randint(-1, vocab_size, (n_row,), generator=generator)
    by_kernel, by_torch = logits.clone(), logits.clone()
    losses = module._losses(by_kernel, targets, with_gradient=True)
    expected = module._plain_losses(by_torch, targets, with_gradient=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    # One unit in the last place of half precision, where the two round to either side.
    rtol = torch.finfo(dtype).eps if dtype in HALF else 2e-6
    torch.testing.assert_close(by_kernel.float(), by_torch.float(), rtol=rtol, atol=1e-7)


@pytest.mark.skipif(library_refuses(module.NAME, module.INTERFACE) is not None, reason="the kernels are not compiled")
@settings(max_examples=60, deadline=None)
@given(
    n_row=st.integers(1, 5),
    vocab_size=st.integers(1, 200),
    scale=st.floats(0.01, 30),
    share=st.floats(0.01, 1),
    tau=st.floats(0.25, 8),
    dtype=st.sampled_from([torch.float32, *HALF]),
    seed=st.integers(0, 2**16),
)
def test_kernel_of_mixed_losses_is_the_plain_way(
    n_row: int, vocab_size: int, scale: float, share: float, tau: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (torch.randn(2, n_row, vocab_size, generator=generator) * scale).to(dtype)
    targets = torch.randint(-1, vocab_size, (n_row,), generator=generator)
    by_kernel, by_torch, untouched = logits.clone(), logits.double(), teacher.clone()
    found = module._mixed_losses(by_kernel, teacher, targets, share, tau, True)
    expected = module._plain_mixed_losses(by_torch, teacher.double(), targets, share, tau, True)
    assert torch.equal(teacher, untouched)
    for values, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=3e-5 * max(1, scale / tau))
    rtol = torch.finfo(dtype).eps if dtype in HALF else 1e-5
    torch.testing.assert_close(by_kernel.double(), by_torch, rtol=rtol, atol=2e-6 * max(1, tau))


@pytest.mark.skipif(library_refuses(module.NAME, module.INTERFACE) is not None, reason="the kernels are not compiled")
def test_targets_with_gaps_between_them_are_read_right() -> None:
    logits = torch.randn(400, 30)
    targets = torch.randint(-1, 30, (400, 2))[:, 0]
    found = module._losses(logits.clone(), targets, with_gradient=True)
    torch.testing.assert_close(found, module._plain_losses(logits.clone(), targets, with_gradient=True))


def test_threads_change_nothing() -> None:
    hidden, unembedding, labels = made_up(1003)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(linear_cross_entropy(hidden, unembedding, labels).losses)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in pairwise(found))


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block has more tokens than BLOCK_BYTES of logits hold, or than the model is wide."""
    sizes: list[int] = []
    plain: Callable[..., Tensor] = module._losses

    def seen(logits: Tensor, targets: Tensor, *, with_gradient: bool) -> Tensor:
        sizes.append(logits.numel() * logits.element_size())
        return plain(logits, targets, with_gradient=with_gradient)

    monkeypatch.setattr(module, "_losses", seen)
    unembedding = nn.Linear(WIDTH, 4096)
    hidden, labels = torch.randn(4, 129, WIDTH, requires_grad=True), torch.randint(0, 4096, (4, 129))
    linear_cross_entropy(hidden, unembedding, labels).total.backward()
    assert max(sizes) <= module.BLOCK_BYTES["cpu"]
    assert sum(sizes) == 4 * 128 * 4096 * 4


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tied", [False, True])
def test_model_without_logits_has_the_loss_of_the_model_with_them(tied: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    config = NormfreeConfig(
        vocab_size=90, n_positions=16, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=tied,
        final_logit_softcapping=softcap,
    )  # fmt: skip
    model = NormfreeForCausalLM(config)
    tokens = torch.randint(0, 90, (3, 16))
    labels = tokens.clone()
    labels[1, 3:9] = -100
    found: list[tuple[float, dict[str, Tensor]]] = []
    for return_logits in (True, False):
        model.zero_grad()
        output = model(input_ids=tokens, labels=labels, return_logits=return_logits)
        output.loss.backward()
        assert (output.logits is not None) == return_logits
        gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        found.append((output.loss.item(), gradients))
    (loss, gradients), (loss_in_blocks, gradients_in_blocks) = found
    assert loss_in_blocks == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == gradients_in_blocks.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(gradients_in_blocks[name], expected, rtol=1e-4, atol=1e-7)
    output = model(input_ids=tokens, labels=labels, return_logits=False, num_items_in_batch=7)
    assert output.token_losses.sum().item() == pytest.approx(7 * output.loss.item(), rel=1e-6)
    assert output.token_losses[1, 2:8].eq(0).all()


def test_no_logits_and_no_labels_is_refused() -> None:
    model = NormfreeForCausalLM(NormfreeConfig(vocab_size=9, n_positions=4, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), return_logits=False)
