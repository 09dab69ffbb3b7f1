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

    C subtracts the mean over channels (LayerNorm) or nothing (RMSNorm, no norm); σ(x) is sqrt(mean((C x)²) + eps), the
    constant of a constant-std norm, or 1 without a norm. For a fixed σ, logits are linear in x.

    norm: a float64 copy of the final norm.
    gain, bias: g and β, float64 [n_embd]; ones and zeros if the norm has none.
    is_centred: whether C subtracts the mean.
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
            InputError: its final norm is not LayerNorm, RMSNorm, constant-std norm or none, or its logits are
                soft-capped.
        """
        if model.config.final_logit_softcapping is not None:
            raise InputError(
                f"the logits of the model are soft-capped (final_logit_softcapping = "
                f"{model.config.final_logit_softcapping}), so even with frozen stds they are not a sum of "
                "contributions; use a model without it"
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
        """Whether logits are linear in x: σ does not depend on x."""
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
        """The norm's output for ``x`` [..., n_embd] with σ frozen to ``std`` [..., 1]: float64 [..., n_embd]."""
        return self.gain * self.centred(x.double()) / std + self.bias

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """C x."""
        return x - x.mean(dim=-1, keepdim=True) if self.is_centred else x

    def directions(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """σ times the gradient of each target's logit, less that of ``against`` if given, in x: float64 [..., n_embd].

        It is C (g ⊙ W_target).
        """
        return self.centred(self.gain * self._rows(targets, against))

    def constants(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """The part of these logits that does not depend on x, W_target · β + b_target: float64 [...]."""
        offset = self.unembedding_bias[targets]
        if against is not None:
            offset = offset - self.unembedding_bias[against]
        return self._rows(targets, against) @ self.bias + offset

    def logits(self, x: torch.Tensor, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        """These logits through the norm as it is, with the σ of ``x`` [..., n_embd]: float64 [...]."""
        read = self.norm(x.double()) - self.bias
        return (read * self._rows(targets, against)).sum(dim=-1) + self.constants(targets, against)

    def effective_unembedding(self) -> torch.Tensor:
        """W with gain and centring folded in, less its mean over the vocabulary: float64 [vocab_size, n_embd].

        Probabilities do not depend on the mean row: it shifts all logits equally.
        """
        folded = self.centred(self.gain * self.unembedding.double())
        return folded - folded.mean(dim=0)

    def _rows(self, targets: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
        rows = self.unembedding[targets].double()
        return rows if against is None else rows - self.unembedding[against].double()
