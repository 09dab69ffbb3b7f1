"""Auxiliary losses of a removal: tokens drawn to one std, and massive tokens made unnecessary."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.errors import InputError
from normfree.removal.midway import Midway
from normfree.removal.removable import RemovableHeadNorm, RemovableNorm, by_head, ratio_to_median, statistic_of
from normfree.training.objectives import Lesson, Objective, Term

STD_LOSS = "residual_std_mismatch"
MASSIVE_LOSS = "massive_log_ratio_squared"
LARGEST_RATIO = "largest_std_over_median"


class StdLosses(Objective):
    """cross-entropy + ``std_loss_weight`` · std loss + ``massive_weight`` · massive loss.

    With s the std of a token before a norm:

    - std loss, mean over tokens, heads and the norms of ``std_loss_norms``. ``squared``: (s - m)², where m, without
      gradient, is the schedule's statistic of the tokens that the constant averages ("Transformers Don't Need LayerNorm
      at Inference Time", Section 3). ``log_ratio``: log(s / m)², which does not depend on scale; m is the norm's
      constant once it has one. Its weight rises over ``std_loss_ramp_steps``.
    - massive loss: log(s / median)² of tokens that are more than ``special_factor`` times the median of their sequence;
      sum over a sequence's tokens, mean over sequences and all norms. The largest ratio, mean over sequences, is
      recorded. Norms of queries, keys and values are left out.
    - With ``random_sequences`` both losses once more, ``random_``, on :func:`random_sequences`. What overflows there is
      left out.

    Raises:
        InputError: the std loss reads the final norm alone, and the model has none.
    """

    reads_entropy = False

    def __init__(self, midway: Midway) -> None:
        super().__init__()
        self.midway = midway
        self.schedule = schedule = midway.schedule
        norms = [norm for _, norm in midway.norms()]
        final = midway.model.model.final_norm
        if schedule.std_loss_norms == "all":
            self.norms = norms
        else:
            self.norms = [final] if isinstance(final, RemovableNorm) else []
        if schedule.std_loss_weight and not self.norms:
            raise InputError("std_loss_weight needs a final norm, which the model does not have; set it to 0")
        of_stream = [norm for norm in norms if not isinstance(norm, RemovableHeadNorm)]
        self.all_norms = of_stream if schedule.massive_weight else []
        for norm in [*self.all_norms, *(self.norms if schedule.std_loss_weight else ())]:
            norm.keeps_own_std = True
        self.unobserved = midway.unobserved_decoder() if schedule.random_sequences else None

    def terms(self, entropy: Tensor | None, lesson: Lesson | None) -> dict[str, Term]:
        terms = self._terms()
        if self.schedule.random_sequences:
            self._see_random_sequences()
            random = self._terms()
            random.pop(LARGEST_RATIO, None)
            # An overflow in sequences that no text has is no divergence, and teaches nothing.
            terms |= {f"random_{name}": term for name, term in random.items() if term.value.isfinite()}
        return terms

    def _see_random_sequences(self) -> None:
        """A forward pass over them, the same in each run; constants do not move."""
        midway, text = self.midway, self.midway.tokens.seen
        assert self.unobserved is not None, "made for random sequences"
        assert text is not None, "the model has seen a batch"
        ids = random_sequences(self.schedule.random_sequences, text, midway.model.config.vocab_size, seed=midway.step)
        with midway.aside():
            midway.tokens.see(ids)
            self.unobserved.to(text.device).train(midway.model.training)(input_ids=ids, use_cache=False)
        midway.tokens.see(text)

    def _terms(self) -> dict[str, Term]:
        """Those of the tokens that were seen last."""
        schedule, terms = self.schedule, {}
        if schedule.std_loss_weight:
            ramp = schedule.std_loss_ramp_steps
            share = min(1.0, (self.midway.step + 1) / ramp) if ramp else 1.0
            mismatch = torch.stack([self._mismatch(norm) for norm in self.norms]).mean()
            terms[STD_LOSS] = Term(mismatch, share * schedule.std_loss_weight)
        if self.all_norms:
            ratios = torch.stack([ratio_to_median(_own_std(norm)).squeeze(-1) for norm in self.all_norms])
            squares = ratios.log().square() * (ratios.detach() > schedule.special_factor)
            terms[MASSIVE_LOSS] = Term(squares.sum(dim=-1).mean(), schedule.massive_weight)
            terms[LARGEST_RATIO] = Term(ratios.detach().amax(dim=(0, 2)).mean(), 0.0)
        return terms

    def _mismatch(self, norm: RemovableNorm) -> Tensor:
        own_std = _own_std(norm)
        assert norm.is_ordinary is not None, "kept with own_std"
        schedule = self.schedule
        stds = [own[among] for own, among in by_head(own_std.detach(), norm.is_ordinary)]
        target = torch.stack([statistic_of(each, schedule.std_statistic) for each in stds]).unsqueeze(-1)
        if schedule.std_loss == "squared":
            return (own_std - target).square().mean()
        if any(norm.is_constant):
            target = norm.std[norm.is_constant.index(True)].unsqueeze(-1)
        return (own_std / target).log().square().mean()


def random_sequences(n: int, text: Tensor, vocab_size: int, *, seed: int) -> Tensor:
    """Sequences that repeat a random pattern, int64 [n, T]; ``text`` is int64 [batch, T].

    The pattern's length is T^u, u uniform in [0, 1); every second one is a piece of the text, the others are random
    tokens. Both are what a corpus has too little of: rare tokens, and repetitions, in which attention agrees so much
    that the residual stream of all tokens grows.
    """
    draw = torch.Generator().manual_seed(seed)
    batch, T = text.shape
    rows = []
    for row in range(n):
        period = int(T ** float(torch.rand(1, generator=draw)))
        sequence, start = (int(torch.randint(size, (1,), generator=draw)) for size in (batch, T - period + 1))
        tokens = torch.randint(vocab_size, (period,), generator=draw).to(text.device)
        pattern = text[sequence, start : start + period] if (seed + row) % 2 else tokens
        rows.append(pattern.repeat(-(-T // period))[:T])
    return torch.stack(rows)


def _own_std(norm: RemovableNorm) -> Tensor:
    assert norm.own_std is not None, "the forward pass has been through the norm"
    return norm.own_std
