"""``normfree.measure``: the attention entropy of a model on given texts, as an object for notebooks."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from normfree.columns import SHARE_OF_UNIFORM, SINK_SHARE, UNIFORM_NATS
from normfree.data import Beginning
from normfree.errors import InputError
from normfree.files import write_text
from normfree.interpret.given_texts import given_sequences
from normfree.interpret.head_entropy import AttentionEntropy, measure_attention_entropy, write_attention_entropy
from normfree.interpret.sequences import SequenceOptions, token_sequences
from normfree.report import paper_style, save_figure
from normfree.report.entropy_figures import headwise_entropy_heatmaps
from normfree.report.notebook import draw_figures_in_notebooks, figure_png
from normfree.training import LoadedModel, load_pretrained

draw_figures_in_notebooks()

MOST_ROWS = 12
"""Most layers that a notebook shows; deeper models lose the middle ones."""
_SHOWN = {
    "layer": "layer",
    "mean_nats": "mean, nats",
    "min_nats": "min",
    "max_nats": "max",
    UNIFORM_NATS: "uniform",
    SHARE_OF_UNIFORM: "of uniform",
    SINK_SHARE: "sink share",
}


@dataclass(frozen=True, repr=False)
class Measurement(AttentionEntropy):
    """The attention entropy of every head, from :func:`measure`; a notebook shows a heatmap and a table of the layers.

    heads, layers, unreadable, n_sequences, n_tokens, sequence_length, uniform_bound:
        as in :class:`~normfree.interpret.AttentionEntropy`; entropies in nats.
    name: the model's name in figures.
    beginning: tokens that were put before each text.
    quantization: how the model's weights were quantized in their file; None if they were not.
    loaded_as: the ``device`` and ``dtype`` it was measured in, and the ``commit`` of a model of the Hub.
    """

    name: str
    beginning: Beginning
    quantization: str | None
    loaded_as: Mapping[str, str]

    @classmethod
    def of(cls, entropy: AttentionEntropy, name: str, beginning: Beginning, model: LoadedModel) -> Measurement:
        """``entropy`` with what is known of the model and its sequences."""
        values = {field.name: getattr(entropy, field.name) for field in fields(AttentionEntropy)}
        origin: dict[str, Any] = {"quantization": model.quantization, "loaded_as": model.loaded_as}
        return cls(**values, name=name, beginning=beginning, **origin)

    @property
    def head_entropy(self) -> pd.DataFrame:
        """``heads`` as :mod:`normfree.plot` takes them; concatenated frames of measurements give a panel each."""
        return self.heads.assign(model=self.name, context_length=self.sequence_length, configuration=self.name, seed=0)

    def plot(self) -> Figure:
        """Heatmap of all heads, layers down, in nats; the colour scale ends at the uniform bound."""
        return headwise_entropy_heatmaps(self.head_entropy, maximum=self.uniform_bound)

    def to_csv(self, path: str | Path) -> list[Path]:
        """Writes ``heads.csv`` and ``layers.csv`` into a folder, made if missing, or the heads into a ``.csv`` file.

        NaN is written as nan. Returns the files.
        """
        path = Path(path)
        if path.suffix == ".csv" and not path.is_dir():
            write_text(path, self.heads.to_csv(index=False, na_rep="nan"))
            return [path]
        write_attention_entropy(self, path)
        return [path / "heads.csv", path / "layers.csv"]

    def save(self, folder: Path) -> None:
        """Writes :meth:`to_csv` and the heatmap, as PNG and PDF, into ``folder``."""
        self.to_csv(folder)
        save_figure(self.plot(), folder, "headwise-entropy")

    def __repr__(self) -> str:
        return f"Measurement({self.name}: {self._summary()})"

    def _summary(self) -> str:
        n_head = sorted({int(n) for n in self.layers["n_head"]})
        parts = [
            f"layers: {len(self.layers)}, heads in each: {' or '.join(map(str, n_head))}",
            f"sequences: {self.n_sequences:,}, tokens: {self.n_tokens:,}",
            f"mean entropy {self.heads['entropy_nats'].mean(skipna=False):.3f} of at most "
            f"{self.heads['uniform_nats'].mean():.3f} nats",
            f"sink share {100 * self.heads['sink_share'].mean(skipna=False):.1f} %",
        ]
        n_nan = int((self.heads["nan_queries"] > 0).sum())
        parts += [f"heads with NaN: {n_nan}"] if n_nan else []
        parts += [f"unreadable modules: {len(self.unreadable)}"] if self.unreadable else []
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        with paper_style():
            encoded = base64.b64encode(figure_png(self.plot())).decode("ascii")
        name = html.escape(self.name)
        unread = "".join(
            f"<li><code>{html.escape(module)}</code>: {html.escape(reason)}</li>"
            for module, reason in self.unreadable.items()
        )
        return (
            f"<div><p><b>{name}</b>: {html.escape(self._summary())}</p>"
            f'<img alt="Attention entropy of every head of {name}" style="max-width: 720px; width: 100%" '
            f'src="data:image/png;base64,{encoded}"/>'
            f"{self._layers_html()}{f'<p>Not read:</p><ul>{unread}</ul>' if unread else ''}</div>"
        )

    def _layers_html(self) -> str:
        shown = self.layers[list(_SHOWN)].rename(columns=_SHOWN)
        shown["top-band heads"] = [
            f"{top} of {n}" for top, n in zip(self.layers["top_band_heads"], self.layers["n_head"], strict=True)
        ]
        for column in shown.columns[1:5]:
            shown[column] = [f"{value:.3f}" for value in shown[column]]
        for column in shown.columns[5:7]:
            shown[column] = ["NaN" if value != value else f"{100 * value:.1f} %" for value in shown[column]]
        n_hidden = len(shown) - MOST_ROWS
        if n_hidden > 0:
            half = MOST_ROWS // 2
            dots = pd.DataFrame([dict.fromkeys(shown.columns, "…")])
            shown = pd.concat([shown.head(half).astype(object), dots, shown.tail(half).astype(object)])
        return str(shown.to_html(index=False, border=0, escape=True))


def measure(
    model: PreTrainedModel | nn.Module | LoadedModel | str | Path,
    texts: Any,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    bos: bool | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> Measurement:
    """The attention entropy of every head of ``model`` on ``texts`` (ReLU's Revival, Eq. 8), in nats. ::

        normfree.measure("gpt2", ["The quick brown fox ...", "def f(x): ..."])

    A given model keeps its device, dtype, mode, gradients and random numbers.

    Args:
        model: a transformers model, wrapped (DDP, PEFT, ``torch.compile``) or not; or a Hub id (``ID@REVISION`` for
            a branch, tag or commit), a model folder, a ``.gguf`` file, or a run or checkpoint folder of Normfree, which
            is loaded.
        texts: a string, strings, a ``datasets`` column, or a ``datasets.Dataset`` with a column ``text`` or
            ``input_ids``; or token ids: a tensor or array [n, T] or [T], lists, or what a tokenizer returns. Texts are
            measured one by one, at any length, without padding; empty ones are skipped.
        tokenizer: for strings: a tokenizer, its name or its folder. Default: the one saved with a named model, or in
            the local folder that a model was loaded from.
        bos: texts begin with the beginning-of-text token. Default: as the tokenizer does; for a run, as it was trained.
            Token ids are measured as they are.
        sequence_length: most tokens in a sequence, beginning included; longer texts are cut. Default: a run's own T;
            for other models 512, or their positions if fewer.
        batch_size: sequences in one forward pass.
        name: of the model in figures; default: what it was loaded by, or its class.
        device: that a named model is loaded on: ``cpu``, ``cuda`` or ``cuda:N``; default: CUDA if available.
        dtype: that a named model is loaded in: ``fp32``, ``bf16`` or ``fp16``; default: as saved.
        revision: branch, tag or commit of a model on the Hub; or ``ID@REVISION``.

    Raises:
        InputError: no such model, no tokenizer, texts of another kind, no tokens, tokens or lengths that the model
            does not take, or no readable attention layer.
    """
    if batch_size < 1:
        raise InputError(f"batch_size has to be at least 1, got {batch_size}")
    loaded, called = _model(model, device=device, dtype=dtype, revision=revision)
    if loaded.model.config.is_encoder_decoder:
        raise InputError(
            f"{loaded.source} is an encoder-decoder, and measure calls a model on one text; use "
            "normfree.EntropyProbe around calls of your own"
        )
    sequences, beginning = given_sequences(loaded, texts, tokenizer, bos=bos, sequence_length=sequence_length)
    entropy = measure_attention_entropy(called, sequences, batch_size)
    return Measurement.of(entropy, name or loaded.source, beginning, loaded)


def measure_on_corpus(
    source: str,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    **sequences: Unpack[SequenceOptions],
) -> Measurement:
    """As :func:`measure`, on sequences of a corpus, or of a run's own evaluation data: ``normfree entropy``.

    Args:
        source: a Hub id, a model folder, a ``.gguf`` file, or a run or checkpoint folder.
        name: the model's name in figures; default: ``source``.
        device, dtype, revision: as for :func:`measure`.
        sequences: see :func:`~normfree.interpret.token_sequences`.

    Raises:
        InputError: the model or the corpus cannot be used, or no attention layer can be read.
    """
    loaded = load_pretrained(source, device=device, dtype=dtype, revision=revision)
    read = token_sequences(loaded, **sequences)
    return replace(measure(loaded, read.tokens, name=name), beginning=read.beginning)


def _model(
    model: PreTrainedModel | nn.Module | LoadedModel | str | Path, **loading: str | None
) -> tuple[LoadedModel, nn.Module]:
    """The transformers model with where it came from, and the module to call."""
    if isinstance(model, (str, Path)):
        model = load_pretrained(str(model), **loading)
    elif any(each is not None for each in loading.values()):
        raise InputError(f"{', '.join(loading)} are for a model that is loaded by its name; move this one with .to()")
    if isinstance(model, LoadedModel):
        return model, model.model
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a {type(model).__name__} is no model; give a transformers model, or the name or folder of one"
        )
    inner = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    if inner is None:
        raise InputError(
            f"{type(model).__name__} contains no transformers model; use normfree.EntropyProbe around calls of your own"
        )
    folder = inner.config._name_or_path
    has_folder = bool(folder) and Path(folder).is_dir()
    source = Path(folder).name if has_folder else folder or type(inner).__name__
    return LoadedModel(source, folder if has_folder else "", inner), model
