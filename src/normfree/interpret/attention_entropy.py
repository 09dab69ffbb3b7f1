"""The attention entropy of every head of a finished model, over sequences of a corpus (ReLU's Revival, Figure 1)."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normfree.data import Beginning, DataConfig, PackedSequences, load_tokenizer, open_corpus, same_data
from normfree.data.beginning import BeginningRule
from normfree.data.packed_sequences import write_sequences
from normfree.entropy import entropy_bands
from normfree.errors import InputError
from normfree.files import write_text
from normfree.modeling.gguf import is_gguf
from normfree.probes import EntropyProbe
from normfree.training import LoadedModel

DEFAULT_SEQUENCE_LENGTH = 512
NEARLY_ALL = 1 - 1e-9
"""Share of a corpus' documents to measure on: a finished model needs no others to be kept for training."""


@dataclass(frozen=True)
class TokenSequences:
    """Sequences to measure on.

    tokens: int64 [n, T], no padding; each begins with the tokens of ``beginning``.
    beginning: what that is, by the rule that gave it.
    """

    tokens: torch.Tensor
    beginning: Beginning

    def __str__(self) -> str:
        n, T = self.tokens.shape
        return f"{n} sequences of {T} tokens ({self.beginning})"


@dataclass(frozen=True)
class AttentionEntropy:
    """What :func:`measure_attention_entropy` found.

    heads:
        layer, module, head, entropy_nats, uniform_nats, share_of_uniform, sink_share, nan_queries; one row a head.
        ``uniform_nats`` is the entropy of uniform attention to the same keys, ``sink_share`` the mean attention
        paid to the first token. A head with a NaN query has NaN means.
    layers:
        layer, module, mean_nats, min_nats, max_nats (over the heads), uniform_nats, share_of_uniform, sink_share
        (means over the heads), top_band_heads (heads in the top quarter of the range up to the largest entropy of any
        head of the model: ReLU's Revival calls it entropic overload), n_head. One row a layer that could be read.
    unreadable: the attention modules that could not be read, and why.
    n_sequences, n_tokens: what was measured on, padding left out.
    sequence_length: tokens of the longest sequence.
    uniform_bound: the largest ``uniform_nats`` of any head: what the model's own masks and windows allow; NaN without
        a head that could be read.
    """

    heads: pd.DataFrame
    layers: pd.DataFrame
    unreadable: dict[str, str]
    n_sequences: int
    n_tokens: int
    sequence_length: int
    uniform_bound: float

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON can hold it; NaN becomes null."""
        return {
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "sequence_length": self.sequence_length,
            "uniform_bound_nats": self.uniform_bound,
            "layers": json.loads(self.layers.to_json(orient="records", double_precision=9)),
            "heads": json.loads(self.heads.to_json(orient="records", double_precision=9)),
            "unreadable": self.unreadable,
        }


class NoTokenizerError(InputError):
    """No tokenizer is saved with a model."""


def tokenizer_of(measured: LoadedModel) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model, as every checkpoint of a run has it.

    Raises:
        NoTokenizerError: none is.
        InputError: it has tokens that the model has no embedding for, or is in a GGUF file and cannot be read.
    """
    try:
        tokenizer = load_tokenizer(measured.checkpoint)
    except InputError as error:
        if is_gguf(measured.checkpoint):
            raise
        missing = f"no tokenizer is saved with {measured.source}; name the one it was trained with"
        raise NoTokenizerError(missing) from error
    measured.check_tokenizer(tokenizer, "the tokenizer saved with it")
    return tokenizer


def check_same_tokens(first: str, other: str) -> None:
    """Whether two models that are compared on one model's sequences read the same tokens, where both have a tokenizer.

    Args:
        first: what was loaded of the model whose tokenizer made the sequences (``LoadedModel.checkpoint``).
        other: that of the model that reads them as well.

    Raises:
        InputError: their vocabularies differ, and the numbers of ``other`` would be those of another text.
    """
    try:
        one, two = load_tokenizer(first), load_tokenizer(other)
    except InputError:
        return
    if one.get_vocab() != two.get_vocab():
        raise InputError(
            f"{first} and {other} have tokenizers of other vocabularies ({len(one)} and {len(two)} "
            "tokens), and models are compared on the same tokens; measure them apart"
        )


def named_tokenizer(measured: LoadedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that name, once it agrees with the model and with the one saved with it."""
    tokenizer = load_tokenizer(name)
    measured.check_tokenizer(tokenizer, f"tokenizer {name!r}")
    try:
        own = load_tokenizer(measured.checkpoint)
    except InputError:
        return tokenizer
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"tokenizer {name!r} has another vocabulary ({len(tokenizer)} tokens) than the one saved with "
            f"{measured.source} ({len(own)}); leave --tokenizer out"
        )
    return tokenizer


def token_sequences(
    measured: LoadedModel,
    *,
    corpus: str | None,
    tokenizer: str | None,
    sequence_length: int | None,
    n_sequences: int,
    cache_dir: Path,
    bos: bool | None = None,
) -> TokenSequences:
    """The first ``n_sequences`` sequences to measure on: int64 [n_sequences, T], each from within one document.

    Without ``corpus`` they are a run's own evaluation sequences. Otherwise the corpus is tokenized with
    ``tokenizer``: by default the run's, or the one saved with the model. Sequences of a run begin as those that it was
    trained on; those of any other model with what the tokenizer puts before a text, so that the model sees what it was
    trained on.

    Args:
        measured: the model that will read them.
        corpus: as in :class:`normfree.data.DataConfig`; may be None for a run.
        tokenizer: a Hugging Face tokenizer's name or folder.
        sequence_length: T; None means the run's, or 512, or what positions the model has if they are fewer.
        n_sequences: at least 1.
        cache_dir: where the data of runs are prepared.
        bos: whether sequences begin with a beginning-of-text token, where that is not left to the model.

    Raises:
        InputError: no corpus or tokenizer, too long sequences, too few of them, or tokens that the model lacks.
    """
    T = sequence_length or default_sequence_length(measured)
    if T < 2 or n_sequences < 1:
        raise InputError(f"need at least 1 sequence of at least 2 tokens, got {n_sequences} of {T}")
    if measured.n_positions is not None and measured.n_positions < T:
        raise InputError(
            f"sequence length {T} is more than the {measured.n_positions} positions of {measured.source}; "
            f"give at most {measured.n_positions}"
        )
    if corpus is None:
        tokens, beginning = _own_sequences(measured, tokenizer, T, cache_dir, bos)
        where = f"the evaluation data of {measured.source}"
    else:
        reader = named_tokenizer(measured, tokenizer) if tokenizer is not None else tokenizer_of(measured)
        beginning = Beginning.of(reader, beginning_rule(measured, bos))
        tokens = _corpus_sequences(corpus, reader, T, n_sequences, beginning)
        where = f"corpus {corpus!r}"
    if len(tokens) < n_sequences:
        raise InputError(
            f"{where} has {len(tokens)} sequences of {T} tokens from within one document, {n_sequences} are asked "
            "for; use a larger corpus, shorter sequences or fewer of them"
        )
    tokens = tokens[:n_sequences]
    n_vocabulary = measured.model.config.get_text_config().vocab_size
    if int(tokens.max()) >= n_vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, the vocabulary of {measured.source} has {n_vocabulary}; "
            "give the tokenizer that the model was trained with"
        )
    return TokenSequences(tokens, beginning)


def beginning_rule(measured: LoadedModel, bos: bool | None) -> BeginningRule:
    """How sequences for a model begin: as ``bos`` says, as a run's own do, or as the model's tokenizer has it."""
    if bos is not None:
        return "bos_token" if bos else "none"
    return "tokenizer" if measured.data is None else measured.data.beginning


def measure_attention_entropy(
    model: nn.Module, sequences: torch.Tensor | Sequence[torch.Tensor], batch_size: int = 8
) -> AttentionEntropy:
    """Runs ``model`` over ``sequences`` under an :class:`~normfree.EntropyProbe`.

    The model runs in evaluation mode and without gradients; afterwards its modules are in the modes they were in, and
    torch's random numbers are where they were. The head on top of the last layer of a transformers model is not
    computed. Compiled models run uncompiled.

    Sequences of different lengths are padded on the right, with an attention mask. Where padding cannot be told from
    tokens in some layer (a model that ignores the mask, sparse masks), the model runs again on batches of equal
    lengths, without padding.

    Args:
        model: any module that an :class:`~normfree.EntropyProbe` takes and that is called with ``input_ids``.
        sequences: int64 [n, T], or n tensors, int64 [T_i]; no padding.
        batch_size: sequences in one forward pass.

    Raises:
        InputError: no attention layer of the model can be read.
    """
    rows = list(sequences)
    n_tokens, longest = sum(len(row) for row in rows), max(len(row) for row in rows)
    probe = EntropyProbe(model)
    _watch(probe, model, list(_batches(rows, batch_size)))
    is_padded = any(len(row) < longest for row in rows)
    if is_padded and (probe.unreadable or bool((probe.rows() != n_tokens).any())):
        probe.reset()
        of_length: dict[int, list[torch.Tensor]] = {}
        for row in rows:
            of_length.setdefault(len(row), []).append(row)
        _watch(probe, model, [each for same in of_length.values() for each in _batches(same, batch_size)])
    heads = _heads_frame(probe)
    bound = float(heads["uniform_nats"].max())
    return AttentionEntropy(heads, _layers_frame(heads), probe.unreadable, len(rows), n_tokens, longest, bound)


def write_attention_entropy(result: AttentionEntropy, folder: Path) -> None:
    """Writes ``heads.csv`` and ``layers.csv`` into ``folder``, made if need be; NaN is written as nan."""
    write_text(folder / "heads.csv", result.heads.to_csv(index=False, na_rep="nan"))
    write_text(folder / "layers.csv", result.layers.to_csv(index=False, na_rep="nan"))


def default_sequence_length(measured: LoadedModel) -> int:
    """T of a run's own sequences; of other models 512, or what positions they have if they are fewer."""
    if measured.data is not None:
        return measured.data.sequence_length
    return min(DEFAULT_SEQUENCE_LENGTH, measured.n_positions or DEFAULT_SEQUENCE_LENGTH)


def _own_sequences(
    measured: LoadedModel, tokenizer: str | None, sequence_length: int, cache_dir: Path, bos: bool | None
) -> tuple[torch.Tensor, Beginning]:
    if measured.data is None or measured.fingerprint is None:
        raise InputError(f"{measured.source} is no run with data of its own; name a corpus to measure on")
    if tokenizer is not None:
        raise InputError("a run's own evaluation data have their tokenizer; name a corpus, or leave the tokenizer out")
    if measured.data.sequence_length != sequence_length:
        raise InputError(
            f"the evaluation data of {measured.source} are sequences of {measured.data.sequence_length} tokens, "
            f"not {sequence_length}; name a corpus to measure on other lengths"
        )
    if bos is not None:
        raise InputError("a run's own evaluation sequences begin as they do; name a corpus, or leave --bos out")
    data = same_data(measured.data, cache_dir, measured.fingerprint)
    return _tensor(data.eval), Beginning.of(data.tokenizer, measured.data.beginning)


def _corpus_sequences(
    corpus: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, n_sequences: int, beginning: Beginning
) -> torch.Tensor:
    opened = open_corpus(DataConfig.model_validate({"corpus": corpus, "eval_fraction": NEARLY_ALL}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        write_sequences(
            path,
            opened.documents("eval"),
            tokenizer,
            sequence_length=sequence_length,
            beginning=beginning.token_ids,
            max_tokens=n_sequences * sequence_length,
        )
        return _tensor(PackedSequences(path))


def _tensor(blocks: PackedSequences) -> torch.Tensor:
    return torch.from_numpy(np.asarray(blocks.tokens, dtype=np.int64))


def _batches(rows: Sequence[torch.Tensor], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Token ids [n, T] and attention mask [n, T], None where nothing is padded; sequences of like lengths together."""
    by_length = sorted(rows, key=len, reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = by_length[start : start + batch_size]
        tokens = pad_sequence(list(batch), batch_first=True)
        lengths = torch.tensor([len(row) for row in batch])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        yield tokens, (None if bool(mask.all()) else mask)


def _watch(probe: EntropyProbe, model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    # the head on top would cost memory for logits that nobody reads
    called = model.base_model if isinstance(model, PreTrainedModel) else model
    parameters = inspect.signature(called.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    with evaluating(model), probe:
        for tokens, mask in batches:
            options: dict[str, Any] = {"use_cache": False}
            if mask is not None:
                options["attention_mask"] = mask.to(device)
            taken = {name: value for name, value in options.items() if takes_any or name in parameters}
            called(input_ids=tokens.to(device), **taken)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While active, ``model`` is in evaluation mode, uncompiled and without gradients.

    On exit every module is in the mode it was in, and torch's random number generators are in their former states.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import would take a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _heads_frame(probe: EntropyProbe) -> pd.DataFrame:
    columns = {
        "entropy_nats": probe.per_head(),
        "uniform_nats": probe.maximum(),
        "share_of_uniform": probe.normalized(),
        "sink_share": probe.sink_share(),
        "nan_queries": probe.nan_rows(),
    }
    layers, heads = np.indices(columns["entropy_nats"].shape)
    frame = pd.DataFrame(
        {
            "layer": layers.ravel(),
            "module": [probe.layers[layer] for layer in layers.ravel()],
            "head": heads.ravel(),
            **{name: _numbers(value) for name, value in columns.items()},
        }
    )
    return frame[~frame["module"].isin(probe.unreadable)].reset_index(drop=True)


def _numbers(table: torch.Tensor) -> NDArray[Any]:
    return (table.double() if table.is_floating_point() else table).numpy().ravel()


def _layers_frame(heads: pd.DataFrame) -> pd.DataFrame:
    finite = heads["entropy_nats"].dropna()
    largest = float(finite.max()) if len(finite) else float("nan")
    rows = []
    for (layer, module), each in heads.groupby(["layer", "module"], sort=True):
        entropy = each["entropy_nats"].to_numpy(dtype=np.float64)
        # a model whose heads all attend to one key, or are all NaN, has no range to divide
        top_band = entropy_bands(entropy, largest)[3] if largest > 0 else 0.0
        rows.append(
            {
                "layer": layer,
                "module": module,
                "mean_nats": entropy.mean(),
                "min_nats": entropy.min(),
                "max_nats": entropy.max(),
                "uniform_nats": each["uniform_nats"].to_numpy(dtype=np.float64).mean(),
                "share_of_uniform": each["share_of_uniform"].to_numpy(dtype=np.float64).mean(),
                "sink_share": each["sink_share"].to_numpy(dtype=np.float64).mean(),
                "top_band_heads": round(top_band * len(each)),
                "n_head": len(each),
            }
        )
    return pd.DataFrame(rows)
