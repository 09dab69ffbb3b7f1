"""Loading of saved causal language models: every weight comes from the file, or the model is refused.

transformers gives random values to parameters without a tensor and ignores tensors without a parameter, with a line in
the log only. Normfree loads every model with :func:`load_model`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from normfree.errors import InputError
from normfree.modeling.gguf import check_gguf_model, gguf_reader, is_gguf, open_gguf
from normfree.sources import hub_access, local_or_hub, no_source

NAMES_SHOWN = 3
INDEX_FILE = "model.safetensors.index.json"
WRAPPERS = {
    "_orig_mod.": "torch.compile; save the module inside it (model._orig_mod)",
    "module.": "DistributedDataParallel; save the module inside it (model.module)",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel; gather the full state dict of the module inside it",
    "base_model.model.": "PEFT; merge the adapter (merge_and_unload) and save the merged model",
}
"""Prefixes in a wrapper's state dict: the wrapper, and what to save instead."""
QUANTIZED = (".qweight", ".qzeros", ".SCB", ".absmax", ".weight_packed", ".weight_scale", ".weight_scale_inv")
"""Endings of tensors that need a ``quantization_config`` to be read."""


@dataclass(frozen=True)
class LoadingReport:
    """Differences between the tensors of a model and of its file.

    missing: parameters of the model that the file has no tensor for.
    unexpected: tensors of the file that no parameter takes.
    mismatched: name, shape in the file, shape in the model.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: dict[str, Any]) -> LoadingReport:
        """From transformers' ``output_loading_info``, which omits what the architecture allows to be missing."""
        return cls(
            sorted(info["missing_keys"]),
            sorted(info["unexpected_keys"]),
            sorted((name, tuple(stored), tuple(built)) for name, stored, built in info["mismatched_keys"]),
        )

    def check(self, where: str, model: PreTrainedModel) -> None:
        """Checks that the file holds exactly the model's tensors.

        Raises:
            InputError: it does not; the message has counts, the first names, the likely cause and the remedy.
        """
        found = []
        if self.missing:
            found.append(f"{_count(self.missing)} missing ({_first(self.missing)})")
        if self.unexpected:
            found.append(f"{_count(self.unexpected)} unexpected ({_first(self.unexpected)})")
        if self.mismatched:
            shapes = [f"{name} {list(stored)} for {list(built)}" for name, stored, built in self.mismatched]
            found.append(f"{_count(shapes)} of another shape ({_first(shapes)})")
        if found:
            cause = self._cause(model)
            raise InputError(
                f"{where} does not hold the weights of {type(model).__name__}: {', '.join(found)}; {cause}"
            )

    def _cause(self, model: PreTrainedModel) -> str:
        """The likely cause, and what to do."""
        for prefix, wrapper in WRAPPERS.items():
            if any(name.startswith(prefix) for name in self.unexpected):
                return f"its names begin with {prefix!r}, as from {wrapper}"
        if any(".lora_" in name or ".base_layer." in name for name in self.unexpected):
            return f"it holds an adapter, as from {WRAPPERS['base_model.model.']}"
        if any(name.endswith(QUANTIZED) for name in self.unexpected):
            return "its weights are quantized, and config.json has no quantization_config; save it with one"
        saved_as = _saved_as(model)
        if saved_as is not None:
            return f"config.json says that it is a {saved_as}, which has another head; give a causal language model"
        around = _common_prefix(self.unexpected, self.missing)
        if around is not None:
            return f"its names begin with {around!r}, as from a module around the model; save the model itself"
        if self.mismatched or self.unexpected:
            return "config.json is that of another model; put the one that belongs to these weights into the folder"
        return "the save was cut short, or a file of it is missing; save or copy the model again"


def load_model(source: str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model of a Hub id, a folder in transformers' form or a GGUF file, in evaluation mode.

    Reads safetensors and GGUF weights only and runs no remote code.

    Args:
        source: Hub id, with ``@REVISION`` or without, folder or file.
        dtype: of the weights; default: as saved, and float32 for those of a GGUF file.

    Raises:
        InputError: there is no such model, it cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    source = local_or_hub(source, "model")
    if is_gguf(source):
        return _load_gguf(Path(source), dtype or torch.float32)
    folder = Path(source)
    if folder.is_dir():
        _check_folder(folder)
    with _one_line_errors(source), hub_access(source) as (name, options):
        model, report = _from_pretrained(name, use_safetensors=True, dtype=dtype or "auto", **options)
    report.check(source, model)
    return model


def _load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    file = open_gguf(path)
    # An absolute path: a file of that name in the working directory would be read instead.
    options = {"gguf_file": str(path.resolve()), "dtype": dtype, "local_files_only": True}
    with _one_line_errors(str(path)), gguf_reader():
        model, report = _from_pretrained(str(path.parent), **options)
    report.check(str(path), model)
    check_gguf_model(file, model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are dequantized: save, convert and train them like any others.
        quantizer.remove_quantization_config(model)
    return model


def _from_pretrained(source: str, **options: Any) -> tuple[PreTrainedModel, LoadingReport]:
    """The model, and the report that transformers would log as a table."""
    logging.disable_progress_bar()  # one line for each file, between Normfree's own
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # in the report, with their names
            **options,
        )
    finally:
        logging.set_verbosity(before)
    model, info = loaded
    return model, LoadingReport.of(info)


def _check_folder(folder: Path) -> None:
    """Checks what transformers ignores in a folder.

    Raises:
        InputError: adapters without their model, a pickled checkpoint, two saves, or shards that the index does not
            name.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json); merge it (merge_and_unload) and save the model"
        )
    if (folder / ".metadata").is_file():
        raise InputError(
            f"{folder} holds a distributed checkpoint (.metadata), which is pickled; save it as safetensors"
        )
    if (folder / INDEX_FILE).is_file():
        if (folder / "model.safetensors").is_file():
            raise InputError(
                f"{folder} holds two saves, model.safetensors and the shards of {INDEX_FILE}; remove one of them"
            )
        _check_shards(folder)


def _check_shards(folder: Path) -> None:
    """Checks that every shard holds exactly the tensors that the index names for it.

    Raises:
        InputError: a shard is missing or damaged, or index and shards are of different saves.
    """
    index = folder / INDEX_FILE
    again = "copy or save the model again"
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named: dict[str, set[str]] = {shard: set() for shard in places.values()}
        for name, shard in places.items():
            named[shard].add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not an index of safetensors shards ({error}); {again}") from error
    missing = sorted(shard for shard in named if not (folder / shard).is_file())
    if missing:
        raise InputError(
            f"{folder} lacks {_count(missing, 'shard')} that {INDEX_FILE} names ({_first(missing)}); {again}"
        )
    for shard, names in named.items():
        try:
            with safe_open(folder / shard, framework="pt") as file:
                held = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / shard} is damaged ({error}); {again}") from error
        if held != names:
            first = sorted(held ^ names)[0]
            raise InputError(
                f"{folder / shard} holds other tensors than {INDEX_FILE} names for it ({first} first): index and "
                f"shards are of different saves; {again}"
            )


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = no_source(source, "model", error)
        if "Unrecognized configuration class" in reason:
            reason = "config.json is of an architecture that is no causal language model"
        raise InputError(
            f"cannot load model {source!r} ({reason}); give a Hub id or a folder of a causal language model with "
            "safetensors weights, or a .gguf file"
        ) from error


def _saved_as(model: PreTrainedModel) -> str | None:
    """The class that ``config.json`` names, if it is no causal language model."""
    named = next(iter(model.config.architectures or ()), None)
    if named is None or named in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), type(model).__name__}:
        return None
    return str(named)


def _common_prefix(unexpected: Iterable[str], missing: Iterable[str]) -> str | None:
    """The prefix with which all missing names are in the file; None without such a prefix."""
    known = set(missing)
    prefixes = Counter(
        name[: -len(rest)]
        for name in unexpected
        for rest in (name.split(".", n)[n] for n in range(1, name.count(".") + 1))
        if rest in known
    )
    prefix, n = max(prefixes.items(), key=lambda each: each[1], default=("", 0))
    return prefix if n and n == len(known) else None


def _count(names: list[Any], what: str = "tensor") -> str:
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''}"


def _first(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
