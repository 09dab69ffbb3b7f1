"""The configuration of the one decoder: sizes, and the choice of norm, placement, activation and attention."""

from collections.abc import Mapping
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from normfree.errors import InputError, unknown_name
from normfree.modeling.activations import ACTIVATIONS, LEAKY_ACTIVATIONS
from normfree.modeling.attention import ATTENTIONS, BIASED_PROJECTIONS
from normfree.modeling.blocks import PLACEMENTS, QKV_NORM_PLACEMENTS
from normfree.modeling.feedforward import FEED_FORWARDS
from normfree.modeling.layer_types import settle_layer_types
from normfree.modeling.norms import NORMS, SCALED_NORMS
from normfree.modeling.qk_norms import QK_NORMS
from normfree.modeling.rotary import check_parameters, settled_parameters
from normfree.spark.sizes import SparkSizes, settle_spark_options

SLOPE_SHARINGS = ("layer", "global")
POSITIONS = ("learned", "rotary")
POSITIVE_OPTIONS = (
    "norm_eps",
    "initializer_range",
    "dyt_alpha",
    "dyt_attention_alpha",
    "attention_scale",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
)


@strict
class NormfreeConfig(PreTrainedConfig):
    """Configuration of :class:`~normfree.NormfreeForCausalLM`; the defaults are GPT-2 Small's architecture.

    Sizes
        ``vocab_size``, ``n_positions`` (longest sequence), ``n_layer``, ``n_head``, ``n_kv_head`` (key and value
        heads; default ``n_head``), ``n_embd``, ``head_dim`` (default ``n_embd / n_head``), ``n_inner`` (width of the
        feed-forward network; default ``4 n_embd``).
    Norms
        ``norm`` (in the blocks) and ``final_norm`` (before the unembedding): ``none | layernorm | rmsnorm | dyt |
        constant_std``, and for ``norm`` ``layernorm_scaling | rmsnorm_scaling`` (times 1/sqrt(layer), layers from 1);
        ``norm_eps``; ``dyt_alpha``: initial α of dyt, default 0.5, and ``dyt_attention_alpha``: another one for the
        norms of attention, default the same; ``norm_is_centered`` (constant_std only): whether it stands for a
        LayerNorm, which takes the mean away, or for an RMSNorm;
        ``norm_placement``: ``pre | post | mix | sandwich | reordered | deepnorm | hybrid | hybrid_star`` (``reordered``
        normalizes what a sublayer puts out, before it is added, as OLMo 2 does); ``n_post_layer``: blocks in post
        placement, from the first (mix only; default a quarter of them, at least 1); ``parallel_residual``:
        attention and feed-forward network read the same input (pre placement only);
        ``qk_norm``: norm of queries and keys over head_dim, ``none | layernorm | rmsnorm`` (also ``False`` for
        ``none``, ``True`` for the kind that ``norm`` is, RMSNorm where that has none), ``layernorm_per_head`` (each
        head has gains of its own) or ``rmsnorm_full_width`` (over all heads together); the hybrid placements have a
        QKV-norm of the kind of ``norm`` instead.
    Feed-forward network
        ``ffn``: ``dense | gated | spark``; ``activation``: a name, or a list of ``n_layer`` names;
        ``negative_slope``: fixed (``leaky_relu``) or initial (``learnable_leaky_relu``) slope, default 0.01, and
        ``slope_sharing``: one learnable slope per ``layer`` or one ``global`` parameter; ``mlp_bias``.
    Attention and positions
        ``attention``: ``softmax | spark``; ``attention_bias``: which projections have a bias, ``none | qk | qkv |
        all`` (also ``False``, ``True`` for ``none``, ``all``); ``position``: ``learned | rotary``;
        ``rope_parameters``: transformers' dictionary (``rope_type``, ``rope_theta``, ``partial_rotary_factor``, ...),
        or one for each kind in ``layer_types``, by its name (Gemma 3), rotary only; ``layer_types``: ``full_attention
        | sliding_attention`` for each layer, and ``sliding_window``: keys that a query of a sliding layer sees, itself
        included. By default all layers are sliding if there is a window, else full; ``positions_skip_padding``:
        positions count the tokens of ``attention_mask`` alone (OPT), instead of all, padding included (learned only);
        ``attention_scale``: factor of the scores q·k, default 1/sqrt(``head_dim``); ``attn_logit_softcapping``: scores
        s become c tanh(s / c) (Gemma 2; softmax only).
    Embedding and unembedding
        ``embedding_multiplier``: a fixed factor of the token embeddings, in their dtype (Gemma: sqrt(``n_embd``));
        ``tie_word_embeddings``; ``lm_head_bias``; ``final_logit_softcapping``: logits l become c tanh(l / c) (Gemma 2).
    Sparsity (``ffn`` or ``attention`` spark), each a count, or a float: a share
        ``ffn_active``: neurons computed for a token, default 0.08 of ``n_inner``; ``ffn_predictor_dim``: dimensions of
        ``n_embd`` that choose them, default half; ``attention_active``: keys that a query attends to at most, default
        256 (a share is one of ``n_positions``); ``attention_predictor_dim``: dimensions of ``head_dim`` that choose
        them, default half; ``topk``: ``statistical | exact``.
    Initialisation and dropout
        N(0, ``initializer_range``) for every weight; ``scale_residual_init`` divides that of the projections into the
        residual stream by sqrt(2 ``n_layer``) (GPT-2); the deepnorm placement scales its own. ``scale_embeddings``:
        the embeddings times one learned number, at first sqrt(``n_embd``) (the LLaMA models of "Transformers without
        Normalization"). ``embedding_dropout``, ``attention_dropout``, ``residual_dropout``: 0 by default.

    Raises:
        InputError: a value that is not allowed, or an option that means nothing beside the others.
    """

    model_type = "normfree"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    if TYPE_CHECKING:
        # As __post_init__ leaves them.
        n_kv_head: int
        head_dim: int
        n_inner: int
        attention_bias: str
        qk_norm: str
        layer_types: list[str]
    else:
        n_kv_head: int | None = None
        head_dim: int | None = None
        n_inner: int | None = None
        attention_bias: str | bool = "all"
        qk_norm: str | bool = "none"
        layer_types: list[str] | None = None

    norm: str = "layernorm"
    norm_placement: str = "pre"
    final_norm: str = "layernorm"
    norm_eps: float | int = 1e-5
    norm_is_centered: bool = True
    dyt_alpha: float | int | None = None
    dyt_attention_alpha: float | int | None = None
    n_post_layer: int | None = None
    parallel_residual: bool = False

    ffn: str = "dense"
    activation: str | list[str] = "gelu"
    negative_slope: float | int | None = None
    slope_sharing: str | None = None
    mlp_bias: bool = True

    ffn_active: float | int | None = None
    ffn_predictor_dim: float | int | None = None
    attention_active: float | int | None = None
    attention_predictor_dim: float | int | None = None
    topk: str | None = None

    attention: str = "softmax"
    attention_scale: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    position: str = "learned"
    positions_skip_padding: bool = False
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None

    initializer_range: float | int = 0.02
    scale_residual_init: bool = False
    scale_embeddings: bool = False
    embedding_multiplier: float | int | None = None
    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0

    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    final_logit_softcapping: float | int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.attention_bias, bool):
            self.attention_bias = "all" if self.attention_bias else "none"
        if isinstance(self.qk_norm, bool):
            self.qk_norm = self._qk_norm_like_norm() if self.qk_norm else "none"
        self._check_names()
        self._check_sizes()
        self._check_options()
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        if set(self.activations) & set(LEAKY_ACTIVATIONS) and self.negative_slope is None:
            self.negative_slope = 0.01
        if "learnable_leaky_relu" in self.activations and self.slope_sharing is None:
            self.slope_sharing = "layer"
        if "dyt" in (self.norm, self.final_norm):
            self.dyt_alpha = 0.5 if self.dyt_alpha is None else self.dyt_alpha
            if self.norm == "dyt" and self.dyt_attention_alpha is None:
                self.dyt_attention_alpha = self.dyt_alpha
        if self.norm_placement == "mix" and self.n_post_layer is None:
            self.n_post_layer = max(1, self.n_layer // 4)
        settle_spark_options(self)
        settle_layer_types(self)
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """transformers' standard form of ``rope_parameters``; learned positions have none."""
        if self.position != "rotary":
            return kwargs
        self.rope_parameters = settled_parameters(self)
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        check_parameters(self)
        return kwargs

    @property
    def activations(self) -> list[str]:
        """The activation of each layer: ``n_layer`` names."""
        return [self.activation] * self.n_layer if isinstance(self.activation, str) else list(self.activation)

    @property
    def spark_sizes(self) -> SparkSizes:
        """The sizes of the sparse layers, as counts; for models that have one."""
        return SparkSizes.of(self)

    @property
    def head_norms(self) -> dict[str, str]:
        """The norm over head_dim of each projection (q, k, v) that has one."""
        if self.norm_placement in QKV_NORM_PLACEMENTS:
            return dict.fromkeys("qkv", self.norm)
        return {} if self.qk_norm == "none" else dict.fromkeys("qk", self.qk_norm)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "NormfreeConfig":
        """A configuration from a mapping that may hold mistakes, such as a file a user wrote.

        Raises:
            InputError: an unknown option, a value of the wrong type, and whatever the constructor refuses.
        """
        for name in options:
            if name not in cls.option_names():
                raise unknown_name("model option", name, cls.option_names())
        try:
            return cls(**options)
        except StrictDataclassFieldValidationError as error:
            raise InputError(f"model option: {error.__cause__}") from error

    @classmethod
    def option_names(cls) -> list[str]:
        """The names of the model's own options, in the order of this class."""
        return list(cls.__annotations__)

    def _check_names(self) -> None:
        for option, allowed in (
            ("norm", NORMS),
            ("final_norm", NORMS),
            ("norm_placement", PLACEMENTS),
            ("qk_norm", QK_NORMS),
            ("ffn", FEED_FORWARDS),
            ("attention", ATTENTIONS),
            ("attention_bias", BIASED_PROJECTIONS),
            ("position", POSITIONS),
        ):
            if getattr(self, option) not in allowed:
                raise unknown_name(option, getattr(self, option), allowed)
        if self.slope_sharing is not None and self.slope_sharing not in SLOPE_SHARINGS:
            raise unknown_name("slope_sharing", self.slope_sharing, SLOPE_SHARINGS)
        for name in self.activations:
            if name not in ACTIVATIONS:
                raise unknown_name("activation", name, ACTIVATIONS)

    def _check_sizes(self) -> None:
        for option in (
            "vocab_size",
            "n_positions",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "head_dim",
            "n_inner",
        ):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"{option} is {value}; it must be at least 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise InputError(
                f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head}); "
                "change one of them, or give head_dim"
            )
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise InputError(f"n_head ({self.n_head}) is not divisible by n_kv_head ({self.n_kv_head})")
        if len(self.activations) != self.n_layer:
            raise InputError(
                f"activation lists {len(self.activations)} names for n_layer = {self.n_layer}; "
                "give one name, or one name per layer"
            )
        for option in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, option) < 1:
                raise InputError(f"{option} is {getattr(self, option)}; it must be in [0, 1)")
        for option in POSITIVE_OPTIONS:
            value = getattr(self, option)
            if value is not None and not 0 < value < inf:
                raise InputError(f"{option} is {value}; it must be positive and finite")
        if self.negative_slope is not None and not isfinite(self.negative_slope):
            raise InputError(f"negative_slope is {self.negative_slope}; it must be finite")

    def _check_options(self) -> None:
        names = set(self.activations)
        if self.negative_slope is not None and not names & set(LEAKY_ACTIVATIONS):
            raise InputError(
                f"negative_slope means nothing for activation {self.activation!r}; "
                f"leave it out, or use one of: {', '.join(LEAKY_ACTIVATIONS)}"
            )
        if self.slope_sharing is not None and "learnable_leaky_relu" not in names:
            raise InputError(
                f"slope_sharing means nothing for activation {self.activation!r}; leave it out, "
                "or use learnable_leaky_relu"
            )
        if self.rope_parameters and self.position != "rotary":
            raise InputError(f"rope_parameters mean nothing with position {self.position!r}; use position: rotary")
        if self.positions_skip_padding and self.position != "learned":
            raise InputError(
                f"positions_skip_padding means nothing with position {self.position!r}, whose scores depend on "
                "differences of positions; leave it out"
            )
        if self.scale_embeddings and self.embedding_multiplier is not None:
            raise InputError("scale_embeddings learns the factor that embedding_multiplier fixes; give one of them")
        for option in ("attention_scale", "attn_logit_softcapping"):
            if getattr(self, option) is not None and self.attention == "spark":
                raise InputError(f"{option} is not defined for attention 'spark'; leave it out, or use softmax")
        self._check_norms()
        self._check_placement()

    def _check_norms(self) -> None:
        names = (self.norm, self.final_norm)
        if self.final_norm in SCALED_NORMS:
            raise InputError(
                f"final_norm {self.final_norm!r} means nothing: the final norm is in no layer; "
                f"use {self.final_norm.removesuffix('_scaling')}"
            )
        if not self.norm_is_centered and "constant_std" not in names:
            raise InputError(
                f"norm_is_centered means nothing for norm {self.norm!r} and final_norm {self.final_norm!r}; "
                "leave it out, or use constant_std"
            )
        if self.dyt_alpha is not None and "dyt" not in names:
            raise InputError(
                f"dyt_alpha means nothing for norm {self.norm!r} and final_norm {self.final_norm!r}; "
                "leave it out, or use dyt"
            )
        if self.dyt_attention_alpha is not None and self.norm != "dyt":
            raise InputError(f"dyt_attention_alpha means nothing for norm {self.norm!r}; leave it out, or use dyt")

    def _check_placement(self) -> None:
        placement = self.norm_placement
        if placement != "pre":
            if self.norm == "none":
                raise InputError(f"norm_placement {placement!r} means nothing for norm 'none'; leave it out")
            if self.norm in ("constant_std", *SCALED_NORMS):
                raise InputError(f"norm {self.norm} is defined for norm_placement pre only, not {placement!r}")
            if self.parallel_residual:
                raise InputError(f"parallel_residual is defined for norm_placement pre only, not {placement!r}")
        if placement == "mix":
            n_post_layer = 1 if self.n_post_layer is None else self.n_post_layer
            if not 1 <= n_post_layer < self.n_layer:
                raise InputError(
                    f"n_post_layer is {n_post_layer} of n_layer = {self.n_layer}; mix has both kinds of blocks: "
                    "it must be from 1 to n_layer - 1"
                )
        elif self.n_post_layer is not None:
            raise InputError(f"n_post_layer means nothing for norm_placement {placement!r}; leave it out, or use mix")
        if placement in QKV_NORM_PLACEMENTS and self.qk_norm != "none":
            raise InputError(
                f"qk_norm means nothing for norm_placement {placement!r}, which normalizes queries, keys and values "
                "itself; leave it out"
            )
        if placement == "deepnorm" and self.scale_residual_init:
            raise InputError(
                "scale_residual_init means nothing for norm_placement 'deepnorm', which scales the initial weights "
                "itself; leave it out"
            )

    def _qk_norm_like_norm(self) -> str:
        return "layernorm" if self.norm in ("layernorm", "layernorm_scaling") else "rmsnorm"
