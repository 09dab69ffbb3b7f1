"""Errors that the command line prints as one line, and messages for unknown names and invalid fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic takes a third of the time of ``normfree --help``
    from collections.abc import Iterable

    from pydantic import BaseModel, ValidationError


SYNONYMS = {
    "learning_rate": ("lr", "max_lr", "peak_lr", "step_size"),
    "batch_size": ("bs", "batch", "global_batch_size", "train_batch_size", "total_batch_size"),
    "micro_batch_size": ("mbs", "micro_batch", "microbatch", "per_device_train_batch_size", "device_batch_size"),
    "tokens": ("epochs", "num_epochs", "num_train_epochs", "max_tokens", "n_tokens", "budget"),
    "steps": ("max_steps", "num_steps", "n_steps", "iters", "max_iters", "iterations", "total_steps"),
    "sequence_length": (
        *("seq_len", "seqlen", "seq_length", "max_seq_len", "max_seq_length", "max_length", "t"),
        *("ctx", "ctx_len", "n_ctx", "context", "context_length", "block_size"),
    ),
    "weight_decay": ("wd", "decay"),
    "warmup_ratio": ("warmup",),
    "warmup_steps": ("warmup_iters", "num_warmup_steps"),
    "learning_rate_decay": ("lr_scheduler_type", "lr_schedule", "schedule", "scheduler", "lr_decay"),
    "final_learning_rate_ratio": ("min_lr", "min_lr_ratio", "min_lr_rate"),
    "max_grad_norm": ("clip", "grad_clip", "clip_grad", "gradient_clipping", "clip_grad_norm"),
    "adam_beta1": ("beta1", "betas"),
    "adam_beta2": ("beta2",),
    "adam_epsilon": ("eps", "adam_eps", "epsilon"),
    "precision": ("dtype", "torch_dtype", "fp16", "bf16", "amp", "mixed_precision"),
    "attn_implementation": ("attn", "attention_implementation"),
    "torch_compile": ("compile",),
    "eval_steps": ("eval_every", "eval_interval"),
    "save_steps": ("save_every", "save_interval", "checkpoint_steps"),
    "logging_steps": ("log_every", "log_interval", "log_steps"),
    "corpus": ("dataset", "data_path", "texts"),
    "train_tokens": ("max_train_tokens",),
    "vocab_size": ("vocab", "vocabulary", "vocabulary_size", "n_vocab"),
    "n_layer": ("layers", "n_layers", "num_layers", "num_hidden_layers", "depth"),
    "n_head": ("heads", "n_heads", "num_heads", "num_attention_heads"),
    "n_kv_head": ("kv_heads", "n_kv_heads", "num_key_value_heads", "num_kv_heads"),
    "n_embd": ("hidden_size", "d_model", "width", "dim", "hidden_dim", "embed_dim", "n_embed"),
    "n_inner": ("intermediate_size", "d_ff", "ffn_dim", "ff_dim", "d_mlp"),
    "activation": ("act", "act_fn", "hidden_act", "activation_function"),
    "norm": ("norm_type", "normalization"),
    "rank": ("r", "lora_rank", "lora_r"),
    "alpha": ("lora_alpha",),
}
"""Names of options, and their names in other programs."""
MOST_LISTED = 40
"""Names in a message; of more, a section is listed."""


class InputError(ValueError):
    """Bad input: a file, config value, checkpoint or command-line argument that cannot be used.

    The message is one line that says what is wrong, where, what is allowed and what to do. The command line
    prints it alone and exits with code 2.
    """


class RunFailedError(Exception):
    """A run that failed through no fault of its input: a full disk, a NaN loss.

    The message is one line that says what happened, what is kept and how to resume. The command line prints it alone
    and exits with code 1.
    """


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """An error for a ``name`` that is not in ``allowed``; suggests a synonym or the closest match.

    Names may be dotted; synonyms apply to the last part. Of many names, those of the suggestion's section are listed.
    """
    from difflib import get_close_matches

    names = [str(each) for each in allowed]
    close = _meant(str(name), names) or get_close_matches(str(name), names, n=1, cutoff=0.5)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    section = close[0].rpartition(".")[0] if close and len(names) > MOST_LISTED else ""
    listed = [each.rpartition(".")[2] for each in names if each.rpartition(".")[0] == section] if section else names
    where = f" in {section}" if section else ""
    return InputError(f"unknown {kind} {name!r}{suggestion}; allowed{where}: {', '.join(listed)}")


def _meant(name: str, allowed: list[str]) -> list[str]:
    """A list of at most one: the allowed name that other programs call ``name``, preferably of the same section."""
    section, _, option = name.rpartition(".")
    option = option.lower().replace("-", "_")
    wanted = [option, *(named for named, theirs in SYNONYMS.items() if option in theirs)]
    found = [each for each in allowed for named in wanted if each.rpartition(".")[2] == named]
    return sorted(found, key=lambda each: each.rpartition(".")[0] != section)[:1]


def invalid_fields(
    where: str, error: ValidationError, schema: type[BaseModel], others: Iterable[str] = ()
) -> InputError:
    """The first mistake that pydantic found in ``where`` (a file, an option), as one line.

    For an unknown field, the closest field of ``schema`` or of ``others``, which are options too, is suggested.
    """
    first, n_more = error.errors()[0], error.error_count() - 1
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = str(unknown_name("option", path, [*field_names(schema), *others]))
    else:
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], (dict, list)) else f" (given: {first['input']!r})"
        message = f"{path}: {reason}{given}" if path else reason
    return InputError(f"{where}: {message}" + (f" (and {n_more} more)" if n_more else ""))


def field_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of a schema's fields and of those in its sections."""
    from pydantic import BaseModel

    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names.extend(field_names(field.annotation, f"{prefix}{name}."))
    return names
