"""From the final residual stream to logits, in float64: the final norm as it is, or linear with its std frozen."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM
from normfree.modeling.constant_std import ConstantStdNorm


@dataclass(frozen=True)
class Readout:
    """logits = W (g ⊙ C x / σ(x) + β) + b: final norm and unembedding of a model.

    C takes the mean over channels off (LayerNorm) or nothing (RMSNorm, no norm); σ(x) is sqrt(mean((C x)²) + eps), the
    constant of a constant-std norm, or 1 where there is no norm. With σ held fixed, logits are linear in x.

    norm: the final norm itself, a copy in float64.
    gain, bias: g and β, float64 [n_embd]; ones and zeros where the norm has none.
    is_centred: whether C takes the mean off.
    unembedding: W [vocab_size, n_embd] in the model's dtype.
    unembedding_bias: b, float64 [vocab_size].
    """

    norm: nn.Module
    gain: torch.Tensor
    bias: torch.Tensor
    is_centred: bool
    unembedding: torch.Tensor
    unembedding_bias: torch.Tensor

    @classmethod
    def of(cls, model: NormfreeForCausalLM) -> Readout:
        """The readout of ``model``.

        Raises:
            InputError: its final norm is none of LayerNorm, RMSNorm, constant-std norm and no norm, or its logits are
                soft-capped.
        """
        if model.config.final_logit_softcapping is not None:
            raise InputError(
                f"the logits of the model are soft-capped (final_logit_softcapping = "
                f"{model.config.final_logit_softcapping}), so they are no sum of contributions even with every std "
                "frozen; use a model without it"
            )
        norm = deepcopy(model.model.final_norm).double()
        if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, ConstantStdNorm, nn.Identity)):
            raise InputError(
                f"cannot read logits through a final norm of the class {type(norm).__name__}; "
                "use a model with final_norm 'layernorm', 'rmsnorm', 'constant_std' or 'none'"
            )
        head = model.lm_head
        zeros = torch.zeros(model.config.n_embd, dtype=torch.float64, device=head.weight.device)
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        return cls(
            norm,
            zeros + 1 if gain is None else gain.detach(),
            zeros if bias is None else bias.detach(),
            isinstance(norm, nn.LayerNorm) or (isinstance(norm, ConstantStdNorm) and norm.is_centered),
            head.weight.detach(),
            zeros.new_zeros(len(head.weight)) if head.bias is None else head.bias.detach().double(),
        )

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in x: σ depends on no x."""
        return isinstance(self.norm, (nn.Identity, ConstantStdNorm))

    def std(self, x: torch.Tensor) -> torch.Tensor:
        """σ of each token of ``x`` [..., n_embd]: float64 [..., 1]."""
        if self.is_linear:
            ones = torch.ones_like(x[..., :1], dtype=torch.float64)
            return ones * self.norm.std if isinstance(self.norm, ConstantStdNorm) else ones
        eps = self.norm.eps
        assert isinstance(eps, float), "norms of Normfree have a number there"
        return (self.centred(x.double()).square().mean(dim=-1, keepdim=True) + eps).sqrt()

    def normalized(self, x: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """What the norm makes of ``x`` [..., n_embd] with its σ frozen to ``std`` [..., 1]: float64 [..., n_embd]."""
        return self.gain * self.centred(x.double()) / std + self.bias

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """C x."""
        return x - x.mean(dim=-1, keepdim=True) if self.is_centred else x

    def directions(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """The gradient of each target's logit in the final residual stream, times σ: float64 [..., n_embd].

        Given ``against``, of the logit of ``targets`` [...] less that of ``against``. It is C (g ⊙ W_target).
        """
        return self.centred(self.gain * self._rows(targets, against))

    def constants(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """The part of these logits that no residual stream changes, W_target · β + b_target: float64 [...]."""
        offset = self.unembedding_bias[targets]
        if against is not None:
            offset = offset - self.unembedding_bias[against]
        return self._rows(targets, against) @ self.bias + offset

    def logits(self, x: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """These logits through the norm as it is, its σ taken from ``x`` [..., n_embd] itself: float64 [...]."""
        read = self.norm(x.double()) - self.bias
        return (read * self._rows(targets, against)).sum(dim=-1) + self.constants(targets, against)

    def effective_unembedding(self) -> torch.Tensor:
        """W with gain and centring folded in and its mean over the vocabulary taken off: float64 [vocab_size, n_embd].

        A shift of all logits together changes no probability, so the mean row has no meaning.
        """
        folded = self.centred(self.gain * self.unembedding.double())
        return folded - folded.mean(dim=0)

    def _rows(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        rows = self.unembedding[targets].double()
        return rows if against is None else rows - self.unembedding[against].double()
