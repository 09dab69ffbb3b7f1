"""Folding: norms with a constant std are linear, so the weights next to them absorb them.

With C = I - 11ᵀ/n, which subtracts the mean (C = I for a former RMSNorm), the norm is N x = C x / σ ⊙ gain + bias. A
linear map takes it in from either side:

    reader   W (N x) + b  =  [W diag(gain) C / σ] x + [b + W bias]
    writer   N (W x + b)  =  [diag(gain) C W / σ] x + [diag(gain) C b / σ + bias]

Norms of queries, keys and values are writers' norms, head by head. A norm of the residual stream itself is x ↦ N x on
every later path: the folded stream z keeps the coordinates of the embedding, with x = M z + c; readers take in M and c,
and writers M⁻¹ (:class:`_Stream`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from normfree.errors import InputError
from normfree.modeling import NormfreeConfig, NormfreeForCausalLM
from normfree.modeling.attention import BIASED_PROJECTIONS
from normfree.modeling.blocks import Block
from normfree.modeling.constant_std import ConstantStdHeadNorm, ConstantStdNorm
from normfree.modeling.norms import POINTWISE_NORMS
from normfree.removal.parts import VALUES

FOLDED = "constant_std"
MAX_ROUNDING = 2e-6
"""Largest error of what a writer adds, by float32 weights in a residual stream whose mean norms subtract. Larger ones
showed in logits, 12 and 24 layers deep, as up to 1e-3 of them."""


class Affine(NamedTuple):
    """x ↦ W x + b; b is None without any bias."""

    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


def remove_norms(model: NormfreeForCausalLM) -> NormfreeForCausalLM:
    """The same function without norms: every ``constant_std`` norm is folded into the weights next to it.

    Args:
        model: its ``norm`` and ``final_norm`` are ``constant_std`` or ``none``; it is not changed.

    Returns:
        A model with ``norm`` and ``final_norm`` ``none`` and the logits of ``model`` (within 1e-5 in float32), of the
        same dtype, on the same device, in the same mode. A ``qk_norm`` stays unless ``qk_norm_is_constant``. Its
        unembedding is not tied, and has a bias if the final norm had one. Weights are folded in float64.

    Raises:
        InputError: a norm divides by each token's own std or is no division, there is no norm to remove, or a norm of
            the residual stream itself cannot be undone (:class:`_Stream`).
    """
    config = model.config
    _check(config)
    maps = folded_maps(model, model.dtype)
    with torch.device(model.device), no_init_weights():
        folded: NormfreeForCausalLM = AutoModelForCausalLM.from_config(
            without_norms(config, maps), dtype=model.dtype, attn_implementation=config._attn_implementation
        )
    weights = model.state_dict()
    for name, each in maps.items():
        weights[f"{name}.weight"] = each.weight
        if each.bias is not None:
            weights[f"{name}.bias"] = each.bias
    expected = folded.state_dict()
    missing = {name: torch.zeros_like(expected[name]) for name in expected.keys() - weights.keys()}
    assert all(name.endswith(".bias") for name in missing), sorted(missing)
    folded.load_state_dict({name: weights[name] for name in expected.keys() & weights.keys()} | missing)
    folded.generation_config = model.generation_config
    return folded.train(model.training)


def _check(config: NormfreeConfig) -> None:
    norms = {"norm": config.norm, "final_norm": config.final_norm}
    if config.ffn == "spark":
        raise InputError(
            "ffn 'spark' reads the residual stream in two parts, whose weights cannot hold a norm of the whole; use a "
            "model with ffn dense or gated"
        )
    if set(norms.values()) == {"none"} and not config.qk_norm_is_constant:
        kept = f"; its qk_norm {config.qk_norm!r} has no constant std" if config.qk_norm != "none" else ""
        raise InputError(f"the model has no norm to remove: its norm and final_norm are none{kept}")
    for option, name in norms.items():
        if name in POINTWISE_NORMS:
            raise InputError(
                f"{option} {name!r} is {POINTWISE_NORMS[name]} and no division by a std: no weight can hold it, and it "
                "cannot be removed"
            )
        if name not in (FOLDED, "none"):
            raise InputError(
                f"{option} {name!r} divides by each token's own std, which no weight can hold; "
                "fine-tune it to a constant first with `normfree remove-norm`"
            )


def without_norms(config: NormfreeConfig, maps: dict[str, Affine]) -> NormfreeConfig:
    """The configuration of the folded model: no constant norms, and the biases that ``maps`` have."""
    options = {name: getattr(config, name) for name in NormfreeConfig.option_names()}
    options |= {"norm": "none", "final_norm": "none", "norm_is_centered": True, "final_norm_is_centered": None}
    options |= {"norm_placement": "pre", "n_post_layer": None}
    if config.qk_norm_is_constant:
        options |= {"qk_norm": "none", "qk_norm_is_constant": False}
    biased = {name.rpartition(".")[2].removesuffix("_proj") for name, each in maps.items() if each.bias is not None}
    attention = biased & set("qkvo")
    options["attention_bias"] = next(name for name, each in BIASED_PROJECTIONS.items() if attention <= set(each))
    options["mlp_bias"] = bool(biased & {"gate", "up", "down"})
    if "lm_head" in maps:
        options |= {"tie_word_embeddings": False, "lm_head_bias": "lm_head" in biased}
    return NormfreeConfig(**options)


@torch.no_grad()
def folded_maps(model: NormfreeForCausalLM, dtype: torch.dtype, *, keeps_final_norm: bool = False) -> dict[str, Affine]:
    """The linear maps of the folded model by module name, in ``dtype``.

    ``lm_head`` is among them if it changes: if the final norm is folded into it, or norms act on the residual stream.
    """
    maps: dict[str, Affine] = {}
    config = model.config
    reads_norms = config.norm_placement == "mix" and config.norm_is_centered and config.final_norm_is_centered is True
    stream = _Stream(is_read_centered=reads_norms)
    for layer, block in enumerate(model.model.blocks):
        assert isinstance(block, Block)
        for sublayer, readers, writer, around in (
            ("attention", ("q_proj", "k_proj", "v_proj"), "o_proj", block.around_attention),
            ("ffn", ("gate_proj", "up_proj"), "down_proj", block.around_ffn),
        ):
            module, name = getattr(block, sublayer), f"model.blocks.{layer}.{sublayer}"
            for reader in (each for each in readers if hasattr(module, each)):
                place = VALUES if reader == "v_proj" else 0
                read = after_norm(_map(getattr(module, reader)), _constant(block, around.before), place)
                head_norm = _constant(module, f"{reader[0]}_norm") if sublayer == "attention" else None
                maps[f"{name}.{reader}"] = before_norm(stream.read(read), head_norm)
            written = before_norm(_map(getattr(module, writer)), _constant(block, around.after))
            maps[f"{name}.{writer}"] = stream.write(written, _constant(block, around.on_sum), block.alpha)
            for each in [each for each in maps if each.startswith(f"{name}.")]:
                maps[each] = maps[each].to(dtype)
    final = _constant(model.model, "final_norm")
    if not stream.is_plain or (final is not None and not keeps_final_norm):
        maps["lm_head"] = stream.read(after_norm(_map(model.lm_head), final, 0)).to(dtype)
    return maps


def _map(linear: nn.Linear) -> Affine:
    return Affine(linear.weight.double(), None if linear.bias is None else linear.bias.double())


def _constant(module: nn.Module, name: str | None) -> ConstantStdNorm | None:
    norm = None if name is None else getattr(module, name)
    return norm if isinstance(norm, ConstantStdNorm) else None


@torch.no_grad()
def after_norm(reader: Affine, norm: ConstantStdNorm | None, place: int) -> Affine:
    """``reader`` of a norm's result number ``place``, as a map of what the norm reads."""
    if norm is None:
        return reader
    weight, bias = reader
    folded = weight * (norm.weight.double() / norm.std[place].double())
    if norm.is_centered:
        folded = folded - folded.mean(dim=1, keepdim=True)
    if norm.bias is not None:
        shift = weight @ norm.bias.double()
        bias = shift if bias is None else bias + shift
    return Affine(folded, bias)


@torch.no_grad()
def before_norm(writer: Affine, norm: ConstantStdNorm | None) -> Affine:
    """``writer`` and the norm of what it writes, head by head for a norm of heads."""
    if norm is None:
        return writer
    width = norm.head_dim if isinstance(norm, ConstantStdHeadNorm) else len(norm.weight)
    gain = (norm.weight.double().view(-1, width) / norm.std[0].double().unsqueeze(-1))[..., None]

    def normed(rows: Tensor) -> Tensor:
        """Of the columns of ``rows`` [out, n]."""
        heads = rows.unflatten(0, (-1, width))
        if norm.is_centered:
            heads = heads - heads.mean(dim=1, keepdim=True)
        return (heads * gain).flatten(0, 1)

    bias = None if writer.bias is None else normed(writer.bias[:, None])[:, 0]
    if norm.bias is not None:
        own = norm.bias.double().repeat(len(writer.weight) // width)
        bias = own if bias is None else bias + own
    return Affine(normed(writer.weight), bias)


class _Stream:
    """A model's residual stream x = M z + c, where no norm acts on the folded model's residual stream z.

    M and c are float64. A norm of x makes M a diagonal [n_embd] or, where it subtracts the mean, a singular matrix
    [n_embd, n_embd]. Writers then need the solution u of C M u = C f for what they write, f: all of f counts only up to
    a constant if the norm on the sum subtracts the mean, or all later readers do (``is_read_centered``).
    """

    def __init__(self, *, is_read_centered: bool) -> None:
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.is_read_centered = is_read_centered

    @property
    def is_plain(self) -> bool:
        """True if x is z."""
        return self.scale is None and self.shift is None

    def read(self, reader: Affine) -> Affine:
        """A map of z in place of ``reader``, a map of x."""
        weight, bias = reader
        if self.shift is not None:
            bias = weight @ self.shift if bias is None else bias + weight @ self.shift
        if self.scale is not None:
            weight = weight * self.scale if self.scale.dim() == 1 else weight @ self.scale
        return Affine(weight, bias)

    def write(self, writer: Affine, on_sum: ConstantStdNorm | None, alpha: float) -> Affine:
        """What to add to z in place of what ``writer`` adds to α x before the norm ``on_sum``, which x then takes in.

        Raises:
            InputError: M cannot be inverted.
        """
        is_centered = self.is_read_centered if on_sum is None else on_sum.is_centered
        columns = torch.column_stack([each for each in (writer.weight, writer.bias) if each is not None])
        columns = self._solved(columns / alpha, is_centered)
        n = writer.weight.shape[1]
        if on_sum is not None:
            self._take_in(on_sum, alpha)
        return Affine(columns[:, :n], None if writer.bias is None else columns[:, n])

    def _solved(self, written: Tensor, is_centered: bool) -> Tensor:
        """u with M u = ``written`` [n_embd, n], or C M u = C ``written``."""
        if self.scale is None:
            return written
        if self.scale.dim() == 1:
            if not (self.scale != 0).all():
                raise InputError("a gain of a norm on the residual stream is 0, which no weight can undo")
            return written / self.scale[:, None]
        if not is_centered:
            raise InputError(
                "a LayerNorm on the residual stream subtracts its mean, and what is written after it is read without "
                "one that does: no weight can hold that; RMSNorm can be folded"
            )
        map_, wanted = _centered(self.scale), _centered(written)
        u = torch.linalg.pinv(map_, rcond=1e-12) @ wanted
        error = (map_ @ u.float().double() - wanted).norm() / wanted.norm()
        if not error < MAX_ROUNDING:
            raise InputError(
                f"the gains of norms on the residual stream differ too much to be undone in float32 (error {error:.1e})"
            )
        return u

    def _take_in(self, norm: ConstantStdNorm, alpha: float) -> None:
        gain = norm.weight.double() / norm.std[0].double()
        scale = torch.full_like(gain, alpha) if self.scale is None else alpha * self.scale
        shift = None if self.shift is None else alpha * self.shift
        if norm.is_centered:
            scale = _centered(scale if scale.dim() == 2 else scale.diag())
            shift = None if shift is None else shift - shift.mean()
        self.scale = scale * (gain if scale.dim() == 1 else gain[:, None])
        shift = None if shift is None else shift * gain
        if norm.bias is not None:
            shift = norm.bias.double() if shift is None else shift + norm.bias.double()
        self.shift = shift


def _centered(columns: Tensor) -> Tensor:
    return columns - columns.mean(dim=0, keepdim=True)
