"""The configuration of the one decoder: the union of its parts' options."""

from collections.abc import Mapping
from inspect import cleandoc
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from normfree.errors import InputError, unknown_name
from normfree.model_options import ModelOptions, option, positive
from normfree.modeling.blocks import BlockOptions
from normfree.modeling.embedding import EmbeddingOptions
from normfree.modeling.rotary import PositionOptions, check_parameters, settled_parameters


@strict
class NormfreeConfig(PreTrainedConfig, BlockOptions, PositionOptions, EmbeddingOptions):
    """Configuration of :class:`~normfree.NormfreeForCausalLM`; the defaults are GPT-2 Small's architecture.

    Raises:
        InputError: a value is not allowed, or an option has no effect together with the others.

    Initialisation and unembedding
    N(0, ``initializer_range``) for every weight; ``tie_word_embeddings``; ``lm_head_bias``;
    ``final_logit_softcapping``: logits l become c tanh(l / c) (Gemma 2).
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

    initializer_range: float | int = option(0.02, check=positive)
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    final_logit_softcapping: float | int | None = option(check=positive)
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.settle_options()
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """transformers' standard form of ``rope_parameters``; learned positions have none."""
        if self.position != "rotary":
            return kwargs
        self.rope_parameters = settled_parameters(self)
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        check_parameters(self)
        try:
            self.validate_rope()
        except (KeyError, ValueError) as error:
            raise InputError(f"rope_parameters: {error.args[0]}") from error
        return kwargs

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


_PARTS = [part for part in NormfreeConfig.__mro__[:0:-1] if issubclass(part, ModelOptions)]
NormfreeConfig.__doc__ = "\n\n".join(cleandoc(part.__doc__ or "") for part in (NormfreeConfig, *_PARTS[1:]))
