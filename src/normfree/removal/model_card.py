"""Model cards of a removal's exports: their README.md, made of what the removal's folder records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from normfree.columns import EVAL_LOSS, EVAL_PPL
from normfree.data.hub import CODEPARROT
from normfree.files import exists, write_text
from normfree.modeling.gguf import is_gguf, open_gguf
from normfree.removal.layout import (
    NORM_FREE,
    NORM_FREE_FOLDER,
    ORIGINAL,
    REMOVAL_FILE,
    REMOVAL_FOLDER,
    SCHEDULE_FILE,
    STOCK_FOLDER,
    TABLE_FILE,
    VANILLA,
)
from normfree.removal.parts import SPECIAL_PARTS
from normfree.removal.schedule import SCHEDULES, load_schedule
from normfree.sources import local_name, looks_local, split_revision
from normfree.training.prediction_comparison import PredictionComparison
from normfree.training.run_config import RunConfig, load_run_config, read_yaml
from normfree.training.run_folder import CONFIG_FILE, PROVENANCE

CARD_FILE = "README.md"
PAPER = "[Transformers Don't Need LayerNorm at Inference Time](https://arxiv.org/abs/2507.02559)"
LICENSE_ENTRIES = ("license", "license_name", "license_link")
UNKNOWN_LICENSE = "not known here; see its own card"
TAGS = ("normfree", "norm-free")
ROWS = {
    ORIGINAL: "original",
    VANILLA: "control: fine-tuned with its norms",
    NORM_FREE: "norm-free: this model",
}
LIMITS = {
    STOCK_FOLDER: (
        "Use float32 or bfloat16: in float16, gains of 10⁶ are infinite and logits NaN.",
        "Fine-tune the norm-free export: an optimizer's steps are lost in the rounding of these gains.",
    ),
    NORM_FREE_FOLDER: ("Programs that do not import Normfree need the stock export.",),
}


@dataclass(frozen=True)
class BaseModel:
    """The model that a removal started from, as a card may name it: without the folders around a local one.

    hub_id: of the model, or of the one that it was trained from; None if neither is of the Hub.
    license: the entries of its card's header about its licence; empty if it is not known here.
    """

    name: str
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)

    @property
    def linked(self) -> str:
        """The name, and a link to the model on the Hub."""
        if self.hub_id is None:
            return self.name
        page = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})"
        return page if self.name == self.hub_id else f"{self.name} (from {page})"


def write_cards(folder: Path) -> None:
    """Writes ``README.md`` into each export of the finished removal in ``folder``."""
    for export in exports(folder):
        write_text(folder / export / CARD_FILE, model_card(folder, export))


def exports(folder: Path) -> list[str]:
    """The exports in a removal's folder, that for tools without Normfree first."""
    return [each for each in (STOCK_FOLDER, NORM_FREE_FOLDER) if (folder / each / "config.json").is_file()]


def model_card(folder: Path, export: str, repository: str | None = None) -> str:
    """The card of an export: base, how to load it, losses, recipe, limits and licence.

    Args:
        folder: of a finished removal.
        export: ``stock`` or ``norm-free``.
        repository: OWNER/NAME on the Hub, whose root is the first of :func:`exports`, the other a subfolder; default:
            the card is of the local folder.
    """
    config = folder / REMOVAL_FOLDER / CONFIG_FILE
    run = load_run_config(config)
    assert run.start_from is not None, "a removal starts from a model"
    return _Card(folder, export, repository, run, read_yaml(config)[PROVENANCE], base_model(run.start_from)).text()


def base_model(source: str) -> BaseModel:
    """The model ``source``, with what its own card, GGUF header or run says. Queries nothing but the Hub's cache."""
    path = Path(source)
    if not exists(path):
        if looks_local(source):  # it was there when the removal began
            return BaseModel(local_name(source))
        name, revision = split_revision(source)
        card = try_to_load_from_cache(name, CARD_FILE, revision=revision)
        return BaseModel(source, name, _license_on(name, Path(card) if isinstance(card, str) else None))
    if is_gguf(source):
        metadata = open_gguf(path).metadata
        stated = {name: metadata.get(f"general.{name.replace('_', '.')}") for name in LICENSE_ENTRIES}
        license_ = {name: text for name, text in stated.items() if isinstance(text, str)}
        return BaseModel(local_name(source), license=license_ if "license" in license_ else {})
    config = (path.parent if path.name.startswith("checkpoint-") else path) / CONFIG_FILE
    if config.is_file():
        start = load_run_config(config).start_from
        origin = BaseModel("") if start is None else base_model(start)
        return BaseModel(local_name(source), origin.hub_id, origin.license)
    return BaseModel(local_name(source), license=_license_on(None, path / CARD_FILE))


def _license_on(hub_id: str | None, card: Path | None) -> dict[str, str]:
    """The licence in the header of a model's card; links into its repository lead there."""
    if card is None or not card.is_file():
        return {}
    try:
        header = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = {name: header[name] for name in LICENSE_ENTRIES if isinstance(header.get(name), str)}
    link = found.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):
        del found["license_link"]
        if hub_id is not None:
            found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found if "license" in found else {}


@dataclass(frozen=True)
class _Card:
    """A card in the making; ``provenance`` is that of ``run``, the fine-tuning that removed the norms."""

    folder: Path
    export: str
    repository: str | None
    run: RunConfig
    provenance: Mapping[str, Any]
    base: BaseModel

    def text(self) -> str:
        sections = {
            "Loading": f"```python\n{self._loading()}```",
            "Losses": self._losses(),
            "Recipe": self._recipe(),
            "Limits": self._limits(),
            "Licence": f"Of the base model: {self._license()}.",
        }
        parts = [f"# {self.base.name} without {self._norms()}", self._introduction()]
        parts += [f"## {name}\n\n{text}" for name, text in sections.items()]
        return str(ModelCard(f"---\n{self._header().to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))

    def _header(self) -> ModelCardData:
        kind, _, argument = self.run.data.corpus.partition(":")
        on_hub = {"codeparrot": CODEPARROT["train"], "hf": argument.partition(":")[0].partition("@")[0]}.get(kind)
        entries: dict[str, Any] = {
            "base_model": self.base.hub_id,
            "base_model_relation": None if self.base.hub_id is None else "finetune",
            "datasets": None if on_hub is None else [on_hub],
            "library_name": "transformers",
            "license": "unknown",
            "pipeline_tag": "text-generation",
            "tags": [*TAGS],
        }
        return ModelCardData(**entries | dict(self.base.license))

    def _introduction(self) -> str:
        text = f"The {self._norms()} of {self.base.linked} were removed by fine-tuning ({PAPER}), with Normfree "
        text += f"{self.provenance['versions']['normfree']}. "
        if self.export == NORM_FREE_FOLDER:
            text += "The constants that replaced standard deviations are folded into the weights of this model."
            other = "A stock model of transformers with equal logits is in"
        else:
            (architecture,) = self._config(self.export)["architectures"]
            text += (
                f"This is a plain `{architecture}`, which any tool loads. Its norms have no effect: ε is about 10¹², "
                "gains make up for it, and the constants that replaced standard deviations are folded into weights."
            )
            other = "The same model without norm layers, which needs Normfree, is in"
        return "".join([text, *(f" {other} {self._place_of(each)}." for each in self._others())])

    def _norms(self) -> str:
        """What was removed: all, or all but those of queries and keys."""
        is_whole = self._config(NORM_FREE_FOLDER).get("qk_norm", "none") == "none"
        return "norms" if is_whole else "norms of the residual stream"

    def _config(self, export: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / export / "config.json").read_text(encoding="utf-8"))
        return content

    def _others(self) -> list[str]:
        return [each for each in exports(self.folder) if each != self.export]

    def _place_of(self, export: str) -> str:
        if self.repository is None:
            return f"`{export}/`, next to this folder"
        return f"{'the root' if self._is_root(export) else f'`{export}/`'} of this repository"

    def _is_root(self, export: str) -> bool:
        return exports(self.folder)[0] == export

    def _loading(self) -> str:
        place = json.dumps(self.repository or f"{self.folder.resolve().name}/{self.export}")
        if self.repository is not None and not self._is_root(self.export):
            place += f', subfolder="{self.export}"'
        registers = "import normfree  # makes the model known to transformers\n"
        return (
            f"{registers if self.export == NORM_FREE_FOLDER else ''}"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({place})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({place})\n"
        )

    def _losses(self) -> str:
        n, length = self.provenance["corpus"]["eval"]["blocks"], self.run.data.sequence_length
        table = pd.read_csv(self.folder / TABLE_FILE)
        corpus = _named(self.run.data.corpus)
        lines = [
            f"Cross-entropy on {n:,} held-out sequences of {length:,} tokens of {corpus}, in float32.",
            "",
            "| model | fine-tuning tokens | loss, nats | perplexity | Δ loss |",
            "|---|---:|---:|---:|---:|",
        ]
        for _, row in table[table["variant"].isin(ROWS)].iterrows():
            numbers = f"{row[EVAL_LOSS]:.4f} | {row[EVAL_PPL]:.2f} | {row['delta_loss']:+.4f}"
            lines.append(f"| {ROWS[row['variant']]} | {row['finetuning_tokens']:,} | {numbers} |")
        return "\n".join([*lines, *self._predictions()])

    def _predictions(self) -> list[str]:
        """The evaluation by corpus, if there is one."""
        compared = PredictionComparison.read(self.folder)
        if compared is None:
            return []
        lines = [
            *("", "Predictions by corpus, with their Jensen-Shannon divergence (JSD) from the original's:", ""),
            "| corpus | model | tokens | loss, nats | JSD, nats | calibration error |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for _, row in compared.evaluation[compared.evaluation["model"].isin(ROWS)].iterrows():
            numbers = f"{row['loss_nats']:.4f} | {row['jsd_nats']:.4f} | {row['ece']:.4f}"
            lines.append(f"| {_named(row['corpus'])} | {ROWS[row['model']]} | {row['tokens']:,} | {numbers} |")
        return lines

    def _recipe(self) -> str:
        recipe, length = self.run.recipe, self.run.data.sequence_length
        end = recipe.final_learning_rate_ratio * recipe.learning_rate
        rows = {
            "corpus": _named(self.run.data.corpus),
            "tokens": f"{recipe.n_tokens(length):,}",
            "steps": f"{recipe.n_steps(length):,} of {recipe.batch_size:,} × {length:,} tokens",
            **self._schedule(),
            "learning rate": f"{recipe.learning_rate:g}, warm-up to step {recipe.n_warmup_steps(length):,}, "
            f"{recipe.learning_rate_decay} decay to {end:g} at step {recipe.n_decay_steps(length):,}",
            "AdamW": f"β {recipe.adam_beta1:g}, {recipe.adam_beta2:g}; weight decay {recipe.weight_decay:g}",
            "precision, seed": f"{recipe.precision}, {self.run.seed}",
        }
        if self.run.lora is not None:
            rows["LoRA"] = f"rank {self.run.lora.rank}, merged"
        return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())

    def _schedule(self) -> dict[str, str]:
        record = json.loads((self.folder / REMOVAL_FOLDER / REMOVAL_FILE).read_text(encoding="utf-8"))
        steps = [each["step"] for each in record["removals"] if each["part"] not in SPECIAL_PARTS]
        schedule = load_schedule(str(self.folder / SCHEDULE_FILE))
        published = next((f", as published for {name}" for name in SCHEDULES if load_schedule(name) == schedule), "")
        n = len(record["stretches"])
        stretched = f"; waits doubled {n} times after divergence" if n else ""
        options = schedule.model_dump(mode="json", exclude={"stages", "recipe"}, exclude_defaults=True)
        return {
            "schedule": f"norms removed in steps {min(steps):,} to {max(steps):,}{published}{stretched}",
            "its options": ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults",
        }

    def _limits(self) -> str:
        limits = (
            f"Sequences of more than {self.run.data.sequence_length:,} tokens, other text and tasks were not measured. "
            "What the base model's card says of its use holds here too.",
            "Nothing bounds the residual stream: a rare sequence, such as a strong repetition, may overflow.",
            *LIMITS[self.export],
        )
        return "\n".join(f"- {each}" for each in limits)

    def _license(self) -> str:
        stated = self.base.license
        if not stated:
            return UNKNOWN_LICENSE
        name = stated.get("license_name", stated["license"])
        return f"[{name}]({stated['license_link']})" if "license_link" in stated else name


def _named(corpus: str) -> str:
    """A corpus as a card may name it: of a local one, only the kind and the last part of its path."""
    kind, _, argument = corpus.partition(":")
    is_local = kind in ("directory", "file", "pairs")
    return f"`{kind}:{Path(argument.partition(':')[0]).name}`" if is_local else f"`{corpus}`"
