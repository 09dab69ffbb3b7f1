"""Finished models to measure or to train further, from the Hub, a folder, a GGUF file or a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normfree.data import DataConfig, PackedData, vocabulary_size
from normfree.devices import default_device, dtype_name, named_device, named_dtype
from normfree.errors import InputError
from normfree.modeling import NormfreeForCausalLM, from_hf
from normfree.modeling.gguf import is_gguf, open_gguf
from normfree.modeling.loading import load_model
from normfree.progress import stage
from normfree.sources import commit_of, local_or_hub, with_revision
from normfree.training.run_config import RunConfig, load_run_config, read_yaml
from normfree.training.run_folder import CONFIG_FILE, PROVENANCE, last_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A causal language model in evaluation mode, and where it came from.

    source: what was asked for: a Hub id, with ``@REVISION`` or without, a folder or a GGUF file.
    checkpoint: what was loaded; another folder than ``source`` for a run.
    run: the run that trained it, None for other models; ``fingerprint`` identifies its tokens.
    quantization: how the weights were quantized in the file, such as "Q4_1, dequantized to float32"; None if they were
        not.
    commit: of a model of the Hub.
    """

    source: str
    checkpoint: str
    model: PreTrainedModel
    run: RunConfig | None = None
    fingerprint: str | None = None
    quantization: str | None = None
    commit: str | None = None

    def __repr__(self) -> str:
        model = f"{type(self.model).__name__}, {self.model.num_parameters():,} parameters"
        from_run = "" if self.run is None else f", run {self.run.configuration} seed {self.run.seed}"
        weights = "" if self.quantization is None else f", {self.quantization}"
        return f"LoadedModel({self.source!r}: {model} on {self.model.device}{from_run}{weights})"

    @property
    def loaded_as(self) -> dict[str, str]:
        """What results record: ``device``, ``dtype``, and for a model of the Hub its ``commit``."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found = {"device": name, "dtype": dtype_name(self.model.dtype)}
        return found if self.commit is None else found | {"commit": self.commit}

    @property
    def data(self) -> DataConfig | None:
        """The data that a run was trained on, None for other models."""
        return None if self.run is None else self.run.data

    @property
    def n_positions(self) -> int | None:
        """The longest sequence the model takes, if its configuration says so."""
        n_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return n_positions if n_positions is not None and n_positions > 0 else None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Checks that the model has an embedding for every token of ``tokenizer``, which messages call ``name``.

        Raises:
            InputError: it has not.
        """
        check_embeddings(self.source, self.n_embedding, tokenizer, name)

    @property
    def n_embedding(self) -> int:
        """Tokens that the model has embeddings for."""
        weight: torch.Tensor = self.model.get_input_embeddings().get_parameter("weight")
        return len(weight)

    def as_normfree(self) -> NormfreeForCausalLM:
        """The model as Normfree's: itself, or converted.

        Raises:
            InputError: it cannot be converted (see :func:`normfree.from_hf`).
        """
        return self.model if isinstance(self.model, NormfreeForCausalLM) else from_hf(self.model)


def load_pretrained(
    source: str, *, device: str | None = None, dtype: str | None = None, revision: str | None = None
) -> LoadedModel:
    """A model from the Hub, a folder in transformers' format, a GGUF file, or a Normfree run or checkpoint folder.

    Only safetensors and GGUF weights are read, and no remote code is run.

    Args:
        source: a Hub id, ``ID@REVISION`` for a branch, tag or commit of it, a folder or a file.
        device: ``cpu``, ``cuda`` or ``cuda:N``; default: see :mod:`normfree.devices`.
        dtype: of weights and computation: ``fp32``, ``bf16`` or ``fp16``; default: as saved.
        revision: that of ``ID@REVISION``.

    Raises:
        InputError: there is no such model, device or dtype, a path has a revision, or the weights are not all there
            (see :func:`normfree.modeling.loading.load_model`).
    """
    place, weights = default_device() if device is None else named_device(device), named_dtype(dtype)
    source = local_or_hub(with_revision(source, revision), "model")
    folder = Path(source)
    checkpoint, run = source, None
    if (folder / CONFIG_FILE).is_file():
        newest = last_checkpoint(folder)
        if newest is None:
            raise InputError(f"run folder {source} has no finished checkpoint-* folder yet; let the run finish")
        checkpoint, run = str(newest), folder
    elif (folder / "config.json").is_file():
        is_checkpoint = folder.name.startswith("checkpoint-") and (folder.parent / CONFIG_FILE).is_file()
        run = folder.parent if is_checkpoint else None
    elif folder.exists() and not is_gguf(source):
        raise InputError(
            f"{source} holds no model: neither transformers' config.json nor a run's {CONFIG_FILE}; "
            "give a Hub id, a model folder, a .gguf file, a run folder or a checkpoint folder"
        )
    with stage(f"loading {source}"):
        model = load_model(checkpoint, dtype=weights).eval().to(place)
    log.debug(
        "loaded %s as %s on %s, %s parameters", checkpoint, dtype_name(model.dtype), place, model.num_parameters()
    )
    if run is None:
        how = quantization_of(checkpoint)
        return LoadedModel(source, checkpoint, model, quantization=how, commit=commit_of(checkpoint))
    fingerprint = read_yaml(run / CONFIG_FILE)[PROVENANCE]["corpus_fingerprint"]
    return LoadedModel(source, checkpoint, model, load_run_config(run / CONFIG_FILE), fingerprint)


def check_embeddings(source: str, n_embedding: int, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Checks that the model ``source`` has an embedding for every token of ``tokenizer``.

    Raises:
        InputError: it has not; the message calls the tokenizer ``name``.
    """
    n_token = vocabulary_size(tokenizer)
    if n_token > n_embedding:
        raise InputError(
            f"{source} has embeddings for {n_embedding} tokens, and {name} has {n_token}; give the tokenizer that the "
            "model was trained with"
        )


def quantization_of(source: str) -> str | None:
    """How the weights of a GGUF file were quantized, from its header; None for unquantized ones and any other model.

    Raises:
        InputError: the file cannot be read.
    """
    return open_gguf(Path(source)).quantization if is_gguf(source) else None


def quantizations(models: Mapping[str, str]) -> dict[str, str]:
    """:func:`quantization_of` models, from name to source; without those that were not quantized."""
    found = {name: quantization_of(source) for name, source in models.items()}
    return {name: how for name, how in found.items() if how is not None}


def starting_model(source: str, data: PackedData) -> NormfreeForCausalLM:
    """The model that a run starts from: :func:`load_pretrained` in float32, in which weights are trained, converted.

    Raises:
        InputError: it cannot be loaded or converted, or is not one for these tokens.
    """
    model = load_pretrained(source, dtype="fp32").as_normfree()
    vocab_size, T = data.statistics["vocab_size"], data.train.sequence_length
    if model.config.vocab_size < vocab_size:
        raise InputError(
            f"{source} has a vocabulary of {model.config.vocab_size} tokens, and the data one of {vocab_size}; give "
            "its own tokenizer with data.tokenizer"
        )
    if model.config.n_positions < T:
        raise InputError(
            f"{source} has {model.config.n_positions} positions, fewer than the {T} tokens of a sequence; lower "
            "data.sequence_length"
        )
    return model
