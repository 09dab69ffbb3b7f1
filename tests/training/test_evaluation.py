"""Losses over a large vocabulary against float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from normfree.modeling.linear_cross_entropy import token_losses
from normfree.training.evaluation import sequence_losses

VOCAB_SIZE = 49152
"""Of SmolLM2: with a few hundred tokens there is nothing to lose."""


def drawn(dtype=torch.float32, vocab_size=VOCAB_SIZE, n=2):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(n, 24, vocab_size, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocab_size, (n, 24), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_token_has_the_loss_of_float64(dtype):
    logits, labels = drawn(dtype)
    expected = cross_entropy(logits[:, :-1].double().transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(logits, labels).double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(sequence_losses(logits, labels).double(), expected.mean(dim=1), rtol=0, atol=5e-6)


def test_the_largest_vocabularies_too():
    logits, labels = drawn(vocab_size=262144, n=1)
    expected = cross_entropy(logits[:, :-1].double().transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(token_losses(logits, labels).double(), expected, rtol=0, atol=3e-6)


def test_infinite_logits_make_infinite_losses_and_an_infinite_target_none():
    logits, labels = drawn(vocab_size=50)
    labels[1, 6:8] = torch.tensor([3, 7])
    logits[0, 3, labels[0, 4]] = -torch.inf  # the target has no probability
    logits[1, 5, 7] = torch.inf  # another token has all of it
    logits[1, 6, 7] = torch.inf  # the target has all of it: inf - inf
    losses = token_losses(logits, labels)
    assert losses[0, 3] == losses[1, 5] == torch.inf
    assert losses[1, 6].isnan()
    assert losses.isfinite().sum() == losses.numel() - 3


def test_tokens_that_are_not_predicted_count_for_nothing():
    logits, labels = drawn()
    labels[0, 3:9] = -100
    labels[1, 1:] = -100
    expected = cross_entropy(logits[0, :-1].double(), labels[0, 1:])
    found = sequence_losses(logits, labels)
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=5e-6)
    assert found[1].isnan()


def test_a_nan_after_the_last_prediction_changes_nothing_and_one_before_shows():
    logits, labels = drawn()
    expected = sequence_losses(logits, labels)
    logits[:, -1] = torch.nan
    assert torch.equal(sequence_losses(logits, labels), expected)
    logits[1, 4] = torch.nan
    assert sequence_losses(logits, labels).isnan().tolist() == [False, True]


def test_gradients_are_those_of_float64():
    logits, labels = drawn()
    logits = logits[:, :6].requires_grad_()
    token_losses(logits, labels[:, :6]).mean().backward()
    wide = logits.detach().double().requires_grad_()
    cross_entropy(wide[:, :-1].transpose(1, 2), labels[:, 1:6]).backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-9)
